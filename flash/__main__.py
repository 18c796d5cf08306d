"""Start of the console command `flash`, and of `python -m flash`."""

import sys

from flash import terminal


def main() -> int:
    """Run `flash` and return its exit code; Ctrl-C is handled before the slow imports."""
    terminal.begin()
    from flash.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
