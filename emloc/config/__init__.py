"""Settings of a run, their composition by Hydra, and the folder with the run's files."""
