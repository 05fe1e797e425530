"""A checkpoint on disk: find its folder, read its tensors and its tokenizer."""
