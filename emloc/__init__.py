"""EMLoC."""
