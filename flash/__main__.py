"""`python -m flash`: the same as the console command `flash`."""

import sys

from flash.cli import main

if __name__ == "__main__":
    sys.exit(main())
