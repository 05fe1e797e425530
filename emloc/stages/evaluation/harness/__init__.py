"""Scores computed by lm-eval. Only modules of this folder import lm-eval."""
