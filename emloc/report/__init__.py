"""From run folders to tables and figures. Imports no torch."""
