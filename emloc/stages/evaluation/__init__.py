"""Scores of a model on held-out rows: our own metrics and those of lm-eval."""
