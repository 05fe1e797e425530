"""The training of an adapter: rows, steps, checkpoints, lean layers."""
