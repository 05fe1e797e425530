"""Benchmarks of speed and memory against other libraries (`make bench`).

They run at full size on a GPU, and with a reduced model on a CPU.
"""
