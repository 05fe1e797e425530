"""The machine: processes, devices, memory, atomic files and the cache of artifacts."""
