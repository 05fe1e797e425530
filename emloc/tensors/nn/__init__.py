"""Modules of an emulator, and putting them into a model."""
