"""Calibration: run the original model over sample rows and record second moments of its layers."""
