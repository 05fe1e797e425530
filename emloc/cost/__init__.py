"""Memory and time: planned before a run, and measured by a benchmark."""
