"""Where a program runs and is timed: this machine, boards and phones, by one protocol."""
