"""Commands that are stopped at any moment: the same command again loses nothing.

`python -m tests.fuzz.kills [SCENE ...] [--kills N] [--only NUMBER] [--seed N]` goes on where an
earlier call with the same log stopped. Prints each fault; the log has a line for each stop.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from flash.records import file_digest
from tests.fuzz import hazards
from tests.fuzz.attempt import Attempt, Ending, fault, finish, start
from tests.fuzz.base import COMMANDS, make
from tests.fuzz.hazards import HAZARDS, Cost, Hazard
from tests.fuzz.kinds import load_all
from tests.fuzz.settings import link_inputs
from tests.search import postgres

_TIMEOUT_S = 300.0
_VOLATILE = {"date", "seconds", "provenance", "tokens_per_s", "peak_rss_mib", "commit"}
"""Keys of values that differ from run to run."""


@dataclass(frozen=True)
class Scene:
    """A command of the project, and what it must end with.

    Attributes:
        arguments: Arguments of `flash`.
        made: What the command makes below the project; it is missing at the start.
        facts: Reads what must be equal, from the folder of a finished command.
        workers: Number of processes that run the command at the same time.
        database: Whether the study is in PostgreSQL.
    """

    arguments: list[str]
    made: tuple[str, ...]
    facts: Callable[[Path], Any]
    workers: int = 1
    database: bool = False


def _stable(value: Any) -> Any:
    """Return a JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in _VOLATILE}
    return [_stable(each) for each in value] if isinstance(value, list) else value


def _digests(*patterns: str) -> Callable[[Path], Any]:
    def facts(work: Path) -> Any:
        return {
            str(path.relative_to(work)): file_digest(path)
            for pattern in patterns
            for path in sorted(work.glob(pattern))
        }

    return facts


def _training(work: Path) -> Any:
    result = json.loads((work / "runs/models/small/result.json").read_text("utf-8"))
    losses = result["before"], result["after"], result["fit"]["curve"]
    return losses, _digests("runs/models/small/checkpoint/*.safetensors")(work)


def _frontier(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / _STUDY / "frontier.json").read_text("utf-8"))
    return found


_STUDY = "runs/studies/small"


def _search(work: Path) -> Any:
    found = _frontier(work)
    trials = [(t["number"], t["state"], t["loss"], t["costs"], t["spec"]) for t in found["trials"]]
    return trials, found["frontier"], found["winners"], (work / _STUDY / "winners").read_text()


def _shared_search(work: Path) -> Any:
    """Read what is certain with several workers, whose order decides what is tried."""
    trials = _frontier(work)["trials"]
    return [(t["number"], t["state"]) for t in trials]


def _measurements(work: Path) -> Any:
    """Read what has been measured, without the times; how often depends on the machine's noise."""
    lines = (work / "runs/measurements.jsonl").read_text("utf-8").splitlines()
    return sorted({(row["key"], row["kind"]) for row in map(json.loads, lines)})


def _export(work: Path) -> Any:
    gate = json.loads((work / "runs/exports/small-small/gate.json").read_text("utf-8"))
    files = _digests("runs/exports/small-small/*.pte", "runs/exports/small-small/**/*.safetensors")
    return _stable(gate), files(work)


def _report(work: Path) -> Any:
    text = (work / "runs/report/index.html").read_text("utf-8")
    return text.rstrip().endswith("</html>"), text.count("<svg"), text.count("<tr")


_COMMANDS = {arguments[0]: arguments for arguments in COMMANDS}
_SEARCH = _COMMANDS["search"]
_MORE = [*_SEARCH, "search.trials=8"]
SCENES = {
    "prepare": Scene(_COMMANDS["prepare"], ("shards",), _digests("shards/*.npy", "shards/*.json")),
    "measure": Scene(
        [*_SEARCH, "stage=latency"],
        ("runs/measurements.jsonl", "runs/studies", "runs/lowered"),
        _measurements,
    ),
    "search": Scene(_SEARCH, ("runs/studies",), _search),
    "workers": Scene(_MORE, ("runs/studies",), _shared_search, workers=4),
    "postgres": Scene(_MORE, ("runs/studies",), _shared_search, workers=4, database=True),
    "train": Scene(_COMMANDS["train"], ("runs/models", "runs/teachers"), _training),
    "export": Scene(_COMMANDS["export"], ("runs/exports", "runs/lowered"), _export),
    "report": Scene(["report"], ("runs/report",), _report),
}
"""Commands to stop, by name."""


class Suite:
    """Stops of one scene.

    Args:
        name: Name of the scene.
        project: The project.
    """

    def __init__(self, name: str, project: Path) -> None:
        self.name, self.scene, self.project = name, SCENES[name], project
        with self._folder() as folder:
            report = folder / "cost"
            began, grown = time.monotonic(), _size(folder)
            ending = self._go_on(folder, hazards.measured(report.resolve()))
            if ending.code != 0:
                raise AssertionError(f"{name}: {ending.errors}")
            moves, memory = map(int, report.read_text("utf-8").split())
            seconds, grown = time.monotonic() - began, _size(folder) - grown
            self.cost = Cost(seconds, moves, memory, grown)
            self.facts = self.scene.facts(folder / "work")
            self.hidden = _hidden(folder / "work")

    def stop(self, random: Random, way: str) -> tuple[str, str | None]:
        """Stop the command once or twice and let it go on.

        Returns:
            What was done, and what is wrong afterwards; None if nothing is.
        """
        hazard = HAZARDS[way](random, self.cost)
        what = hazard.what
        with self._folder(hazard.disk) as folder:
            for number in range(1 if hazard.disk is not None else random.choice([1, 2])):
                if number:
                    again = HAZARDS["kill"](random, self.cost)
                    what, hazard = f"{what}, then {again.what}", again
                said = self._stopped(folder, hazard, random)
                if said is not None:
                    return what, said
            self.make_room()
            late = random.random() < 0.2
            clock = hazards.library_of_clocks() if late else None
            if clock is not None:
                what = f"{what}, then the clock is a day late"
            main = hazards.yesterday(clock) if clock is not None else None
            return what, self._wrong(self._go_on(folder, main), folder)

    @contextmanager
    def _folder(self, room: int | None = None) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="kill_") as name, ExitStack() as stack:
            folder, work = Path(name), Path(name) / "work"
            work.mkdir()
            self.make_room: Callable[[], None] = lambda: None
            self.storage: list[str] = []
            if self.scene.database:
                folder.chmod(0o755)
                data = folder / "server"
                data.mkdir()
                self.storage = [f"search.storage='{stack.enter_context(postgres.server(data))}'"]
            if room is not None:
                room += _size(self.project / "runs")
                self.make_room = stack.enter_context(hazards.small_disk(work, room))
            link_inputs(self.project, work)
            shutil.copytree(self.project / "runs", work / "runs")
            for path in self.scene.made:
                _remove(work / path)
            yield folder

    def _attempt(self, main: Callable[[], int] | None) -> Attempt:
        words = [*self.scene.arguments, *self.storage]
        return Attempt(self.name, lambda work: words, timeout_s=_TIMEOUT_S, main=main)

    def _together(
        self, folder: Path, mains: list[Callable[[], int] | None]
    ) -> tuple[list[int], list[Attempt]]:
        attempts = [self._attempt(main) for main in mains]
        return [start(a, folder, str(n)) for n, a in enumerate(attempts)], attempts

    def _stopped(self, folder: Path, hazard: Hazard, random: Random) -> str | None:
        """Run the command until a hazard stops it, and say what is wrong with its end."""
        count = self.scene.workers
        children, attempts = self._together(folder, [hazard.main, *[None] * (count - 1)])
        if hazard.signal is not None:
            time.sleep(hazard.after_s)
            chosen = children if hazard.group else [random.choice(children)]
            for child in chosen:
                _send(child, hazard)
        said = None
        for number, (child, attempt) in enumerate(zip(children, attempts, strict=True)):
            ending = finish(child, attempt, folder, str(number))
            said = said or _wrong_end(attempt, ending, folder / "work", hazard)
        return said

    def _go_on(self, folder: Path, main: Callable[[], int] | None) -> Ending:
        children, attempts = self._together(folder, [main, *[None] * (self.scene.workers - 1)])
        endings = [
            finish(child, attempt, folder, str(number))
            for number, (child, attempt) in enumerate(zip(children, attempts, strict=True))
        ]
        return next((ending for ending in endings if ending.code != 0), endings[0])

    def _wrong(self, ending: Ending, folder: Path) -> str | None:
        if ending.timed_out:
            return "hangs when it goes on"
        if ending.code != 0:
            return f"does not go on: {ending.errors.strip()[-600:]}"
        found = self.scene.facts(folder / "work")
        if found != self.facts:
            return f"other results: {_difference(self.facts, found)}"
        left = _hidden(folder / "work") - self.hidden
        return f"left behind: {', '.join(sorted(left))}" if left else None


def _send(child: int, hazard: Hazard) -> None:
    assert hazard.signal is not None
    send = os.killpg if hazard.group else os.kill
    try:
        send(child, hazard.signal)
    except ProcessLookupError:  # it has not made its group yet
        os.kill(child, hazard.signal)


def _wrong_end(attempt: Attempt, ending: Ending, work: Path, hazard: Hazard) -> str | None:
    """Say what is wrong with the end of a command that may have been stopped."""
    if ending.timed_out:
        return f"hangs: {hazard.what}"
    if ending.code < 0:  # also by a library that gets no memory
        return None
    if hazard.signal is not None and ending.code == 128 + hazard.signal:
        traced = "Traceback" in ending.errors or "a fault of flash" in ending.errors
        return f"traceback: {ending.errors[-300:]}" if traced else None
    return fault(attempt, ending, work)


def _difference(expected: Any, found: Any, path: str = "") -> str:
    """Name the first place in which two values differ."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        pairs = [(key, expected[key], found[key]) for key in expected]
    elif (
        isinstance(expected, list | tuple)
        and isinstance(found, list | tuple)
        and len(expected) == len(found)
    ):
        pairs = [(n, a, b) for n, (a, b) in enumerate(zip(expected, found, strict=True))]
    else:
        return f"{path}: {str(expected)[:200]} became {str(found)[:200]}"
    return next(_difference(a, b, f"{path}/{key}") for key, a, b in pairs if a != b)


def _hidden(work: Path) -> set[str]:
    """Return hidden files and folders of the command's, which should be gone at its end."""
    runs = [work / "runs", work / "shards"]
    return {
        str(path.relative_to(work))
        for folder in runs
        if folder.is_dir() and not folder.is_symlink()
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.name.endswith((".part", ".tmp"))
    }


def _size(folder: Path) -> int:
    """Return the room that the files below a folder take [bytes]."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> int:
    """Run the suite and return 3 if there are faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("scenes", nargs="*", choices=[[], *SCENES], metavar="SCENE")
    parser.add_argument("--kills", type=int, default=20, help="stops of each scene")
    parser.add_argument("--only", type=int, help="number of one stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="project and log")
    options = parser.parse_args()
    load_all()
    make(options.folder / "project")
    log = options.folder / f"kills_{options.seed}.jsonl"
    lines = log.read_text("utf-8").splitlines() if log.is_file() else []
    done = Counter(json.loads(line)["scene"] for line in lines)
    names = [name for name in options.scenes or SCENES if _is_possible(SCENES[name])]
    faults = sum(_scene(name, options, log, done[name]) for name in names)
    return 3 if faults else 0


def _is_possible(scene: Scene) -> bool:
    return not scene.database or postgres.programs() is not None


def _scene(name: str, options: argparse.Namespace, log: Path, first: int) -> int:
    """Make the stops of a scene and return the number of faults."""
    wanted = range(first, options.kills) if options.only is None else [options.only]
    ways = [way for way in HAZARDS if way != "disk" or hazards.can_mount()]
    suite, found, began = Suite(name, options.folder / "project"), 0, time.monotonic()
    for number in wanted:
        way = ways[number % len(ways)]
        what, said = suite.stop(Random(f"{name} {options.seed} {number}"), way)
        row = {"scene": name, "number": number, "way": way, "what": what, "fault": said}
        if said is not None:
            found += 1
            print(f"{name} {number}: {what}\n    {said}", flush=True)
        if options.only is None:
            with log.open("a", encoding="utf-8") as file:
                print(json.dumps(row), file=file)
    seconds = time.monotonic() - began
    print(f"{name}: {found} faults from {first} to {options.kills} in {seconds:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
