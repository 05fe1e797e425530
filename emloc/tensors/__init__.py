"""Mathematics on tensors, and layers; independent of files, settings and devices."""
