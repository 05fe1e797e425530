"""Scores of held-out rows, of our own and of lm-eval."""
