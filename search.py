"""Search for the frontier of quality and latency: `python search.py`."""

from functools import partial

from flash.config import SearchJobSettings, entry
from flash.report.figures import study_figures
from flash.search.run import run_search

if __name__ == "__main__":
    entry(SearchJobSettings, partial(run_search, figures=study_figures))
