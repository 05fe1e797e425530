"""Numbers of a run while it runs: the log in its folder, and trackers that mirror the log."""
