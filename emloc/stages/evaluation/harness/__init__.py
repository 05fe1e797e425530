"""Scores by lm-eval, which is imported in this folder and nowhere else."""
