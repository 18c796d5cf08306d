"""Rounding: rotation, calibration and rounding of a decoder's weights to the device's format."""
