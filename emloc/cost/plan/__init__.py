"""Predict memory and time of a training without weights (`emloc plan`, `compression=auto`)."""
