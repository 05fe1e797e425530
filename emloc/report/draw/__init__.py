"""One file for each kind of figure, and what they are made of. Imports no torch."""
