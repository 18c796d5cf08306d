"""Search for the frontier of quality and latency: `python search.py`."""

from flash.cli import run

if __name__ == "__main__":
    run("search")
