"""Samples, and what is measured while they pass through the blocks."""
