"""The memory-saving training path (setting `train.lean`): less memory and fewer, larger operations.

Each module replaces one part of plain training: adapted layers, norms and MLPs, token embedding,
loss, saved activations. The results are equal, up to rounding in the model's dtype.
"""
