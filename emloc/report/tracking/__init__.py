"""Where a run's numbers go while it is made: one writer, its file, and who follows it."""
