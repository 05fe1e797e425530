"""Modules that emulators use, and functions that replace modules of a model."""
