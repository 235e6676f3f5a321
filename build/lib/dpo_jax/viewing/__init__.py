"""Views for people: tokens in colour, answers, reports, runs side by side."""
