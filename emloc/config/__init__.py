"""What a run is asked for, how that is composed, and the folder it is kept in."""
