"""An example, and how it becomes a batch."""
