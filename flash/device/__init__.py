"""Devices that run and time programs by one protocol: this machine, boards and phones."""
