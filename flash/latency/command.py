"""`flash measurements`: export a measurement store as CSV, or merge two stores."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flash.commands import command
from flash.errors import InputError
from flash.latency.store import MeasurementStore
from flash.paths import Runs
from flash.terminal import finish


def main(arguments: Sequence[str]) -> int:
    """Run `flash measurements` and return its exit code.

    Raises:
        InputError: A store cannot be read.
    """
    parser = argparse.ArgumentParser(prog=command("measurements"), description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the store as CSV, one row per latency")
    export.add_argument("csv", type=Path)
    merge = commands.add_parser("merge", help="add the measurements of another store")
    merge.add_argument("store", type=Path, help="another runs/measurements.jsonl")
    return _run(parser.parse_args(arguments))


def _run(arguments: argparse.Namespace) -> int:
    store = MeasurementStore(Runs(arguments.runs).measurements)
    if arguments.command == "export":
        print(f"{store.write_csv(arguments.csv)} measurements")
        finish([arguments.csv], f"{command('search')} stage=latency")
        return 0
    if not arguments.store.is_file():
        raise InputError(f"{arguments.store}: no such file; give another measurements.jsonl")
    added = store.merge(MeasurementStore(arguments.store))
    print(f"{added} measurements added, {len(store)} in all")
    finish([store.path], command("search"))
    return 0
