"""Runs and sweeps of runs: one job, the progress of all jobs, and jobs whose process is killed."""
