"""Parts of `experiments.imdb_sentiment`: data, runs and measurements."""
