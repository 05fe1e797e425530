"""The machine: processes, devices, memory, and files that are written whole."""
