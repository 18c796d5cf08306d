"""Search for the frontier of quality and latency: `python search.py`."""

from flash.config import SearchJobSettings, entry
from flash.search.run import run_search

if __name__ == "__main__":
    entry(SearchJobSettings, run_search)
