"""`flash report`: print the result table of a study and write its HTML page."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from flash.commands import command
from flash.paths import Runs
from flash.report.data import ReportData, read
from flash.report.page import write_page
from flash.report.table import as_text
from flash.report.wandb_run import log_report
from flash.terminal import finish
from flash.tracking.settings import LoggerSettings


def _following(data: ReportData, folder: Path) -> str:
    """The command for the winners that lack a training or, after that, an export."""
    own = f" runs={shlex.quote(str(folder))}" if folder != Path("runs") else ""
    for verb, made in (("train", "trained"), ("export", "exported")):
        lacking = [each.name for each in data.models[1:] if getattr(each, made) is None]
        if lacking:
            return f"{command(verb)} -m +arch={','.join(lacking)}{own}"
    names = [each.name for each in data.models[1:]]
    return f"{command('evaluate')} +arch={names[0]}{own}" if names else f"{command('search')}{own}"


def main(arguments: Sequence[str]) -> int:
    """Run `flash report` and return its exit code.

    Raises:
        InputError: There is no finished search, or a file is damaged.
    """
    parser = argparse.ArgumentParser(prog=command("report"), description=__doc__)
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
    finish([runs.report], _following(data, options.runs))
    return 0
