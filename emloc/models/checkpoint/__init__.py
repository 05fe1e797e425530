"""A checkpoint on disk: which one, its tensors and its tokenizer."""
