"""Training of an adapter: trainer, checkpoints, callbacks and the memory-saving path."""
