"""Importance scores from a calibration pass, and the prune operator that uses them."""
