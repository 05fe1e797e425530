"""Model families: find a checkpoint, select layers to adapt and compress, encode examples."""
