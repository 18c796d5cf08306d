"""`flash report`: print the result table of a study and write its HTML page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flash.paths import Runs
from flash.report.data import read
from flash.report.page import write_page
from flash.report.table import as_text
from flash.report.wandb_run import log_report
from flash.tracking.settings import LoggerSettings


def main(arguments: Sequence[str]) -> int:
    """Run `flash report` and return its exit code.

    Raises:
        InputError: There is no finished search, or a file is damaged.
    """
    parser = argparse.ArgumentParser(prog="flash report", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--study", help="name of a study (default: the latest)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log the report to this W&B project too")
    options = parser.parse_args(arguments)
    runs = Runs(options.runs)
    data = read(runs, options.study)
    write_page(data, runs.report)
    if options.wandb:
        log_report(data, runs, LoggerSettings(name="wandb", project=options.wandb))
    print(as_text(data.models))
    print(f"\nreport: {runs.report.resolve()}")
    return 0
