"""From text to batches: examples, tokens, packed rows."""
