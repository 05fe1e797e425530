"""What a training will need, before a weight is read (`emloc plan`, `compression=auto`)."""
