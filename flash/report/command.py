"""`flash report`: print the result table of studies and models, and write their HTML page."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from flash.commands import command
from flash.errors import InputError, nearest
from flash.paths import Runs
from flash.report.data import ReportData
from flash.report.page import write_page
from flash.report.reading import read
from flash.report.table import as_text
from flash.report.wandb_run import log_report
from flash.terminal import finish
from flash.tracking.settings import LoggerSettings

_OPTIONS = ("runs", "study", "wandb")


def _with_dashes(argument: str) -> str:
    """Return `--key=value` for `key=value`, as it is typed for the other commands.

    Raises:
        InputError: There is no option of this name.
    """
    match = re.match(r"(\w+)=", argument)
    if match is None:
        return argument
    if match[1] not in _OPTIONS:
        raise InputError(f"{argument}: no such option of the report; {nearest(match[1], _OPTIONS)}")
    return f"--{argument}"


def _following(data: ReportData, folder: Path) -> str:
    """The command for the winners that lack a training or, after that, an export."""
    found = [each for study in data.studies for each in study.models[1:]]
    own = f" runs={shlex.quote(str(folder))}" if folder != Path("runs") else ""
    for verb, made in (("train", "trained"), ("export", "exported")):
        lacking = [each.name for each in found if getattr(each, made) is None]
        if lacking:
            return f"{command(verb)} -m +arch={','.join(lacking)}{own}"
    names = [each.name for each in found]
    return f"{command('evaluate')} +arch={names[0]}{own}" if names else f"{command('search')}{own}"


def main(arguments: Sequence[str]) -> int:
    """Run `flash report` and return its exit code.

    Raises:
        InputError: There is nothing to report, or no study of a name.
    """
    parser = argparse.ArgumentParser(prog=command("report"), description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument(
        "--study",
        metavar="NAME[,NAME]",
        help="studies to show, several side by side (default: the latest)",
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="log the report to this W&B project too")
    options = parser.parse_args([_with_dashes(argument) for argument in arguments])
    runs = Runs(options.runs)
    names = [name for name in (options.study or "").split(",") if name]
    data = read(runs, names)
    write_page(data, runs.report)
    if options.wandb:
        log_report(data, runs, LoggerSettings(name="wandb", project=options.wandb))
    print(as_text(data.models))
    for fault in data.faults:
        print(f"warning: {fault}", file=sys.stderr)
    finish([runs.report], _following(data, options.runs))
    return 0
