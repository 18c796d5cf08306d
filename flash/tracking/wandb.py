"""Weights & Biases backend of the tracking, which goes offline if it cannot be online."""

import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from flash.compat.wandb import record_use
from flash.errors import without_secrets
from flash.tracking.artifacts import Artifact
from flash.tracking.backend import Backend, JobType, Metrics, RunInfo
from flash.tracking.links import write_link
from flash.tracking.settings import LoggerSettings

log = logging.getLogger(__name__)

_INIT_TIMEOUT_S = 6.0
"""Longest wait for an answer when a run begins [s]; with the start of W&B it takes up to 10 s."""
_FINISH_TIMEOUT_S = 60.0
"""Longest wait for the rest of the records when a run ends [s]; they stay on disk."""
_UPLOAD_TIMEOUT_S = 3600.0
"""The same with files to upload [s]."""
_LONGEST_REASON = 200
"""Most characters of an error of W&B that are shown."""
_LONGEST_TAG = 64
"""Most characters of a tag."""

_STEPS = {JobType.train: "trainer/global_step", JobType.search: "search/trial"}
"""Name of the step of each type of run that has steps."""
_DEFINITIONS: dict[JobType, list[dict[str, Any]]] = {
    JobType.train: [
        {"name": "trainer/global_step"},
        {"name": "train/tokens"},
        {"name": "train/seconds"},
        {"name": "train/*", "step_metric": "train/tokens"},
        {"name": "val/*", "step_metric": "train/tokens"},
        {"name": "speed/*", "step_metric": "train/tokens"},
    ],
    JobType.search: [
        {"name": "search/trial", "summary": "none"},
        # The summary of a search is its best, which `summarize` sets, not its last trial.
        {"name": "search/*", "step_metric": "search/trial", "summary": "none"},
    ],
}
"""Axes and summaries of metrics, by type of run."""

_gave_up = False
"""True after W&B has not answered once: further runs of this process begin offline at once."""


class WandbBackend(Backend):
    """Sends the records of one run to W&B, or to files for `wandb sync`.

    Args:
        run: Run of W&B.
        info: Description of the run.
        upload: Upload the files of artifacts.
    """

    def __init__(self, run: wandb.Run, info: RunInfo, *, upload: bool) -> None:
        self._run, self._step, self._upload = run, _STEPS.get(info.job), upload
        self._facts = _facts(info)
        for definition in _DEFINITIONS.get(info.job, []):
            run.define_metric(**definition)

    def log(self, metrics: Metrics, step: int | None) -> None:
        steps = {self._step: step} if self._step is not None and step is not None else {}
        self._run.log({**steps, **metrics})

    def summarize(self, values: Metrics) -> None:
        self._run.summary.update(dict(values))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table})
        self._run.summary.update({name: table})  # a table is shown from there

    def log_figures(self, draw: Callable[[], Mapping[str, Any]]) -> None:
        figures = {f"figures/{name}": wandb.Plotly(figure) for name, figure in draw().items()}
        self._run.log(figures)

    def use(self, artifact: Artifact) -> None:
        record_use(self._run, self._build(artifact, {}))

    def publish(self, artifact: Artifact) -> None:
        self._run.log_artifact(self._build(artifact, self._facts))

    def _build(self, artifact: Artifact, facts: Mapping[str, Any]) -> wandb.Artifact:
        kind, metadata = artifact.kind.value, {**facts, **artifact.metadata()}
        built = wandb.Artifact(artifact.title, type=kind, metadata=metadata)
        for path in map(Path.absolute, artifact.files):
            if self._upload:
                # Neither kind of copy: results stay where they are, and may be large.
                built.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
            else:
                built.add_reference(f"file://{path}", name=path.name)
        return built

    def close(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=int(failed))
        except ConnectionError:  # the process of W&B has ended
            _end_service()
            raise


def _end_service() -> None:
    """End the process of W&B, or what is left of it; the next run starts a new one."""
    with suppress(ConnectionError):
        wandb.teardown()


def _facts(info: RunInfo) -> dict[str, Any]:
    return info.origin.facts if info.origin is not None else {}


def start(settings: LoggerSettings, folder: Path, info: RunInfo) -> WandbBackend | None:
    """Start or resume a run, offline if W&B has no key or does not answer; None if it is disabled.

    Args:
        settings: Options of W&B.
        folder: Folder of local files.
        info: Description of the run.
    """
    mode = _mode(settings)
    if mode == "disabled":
        return None
    run = _try_online(settings, folder, info) if mode == "online" else None
    if run is None:
        run = _init(settings, folder, info, "offline" if mode == "online" else mode)
    files = Path(run.dir).parent
    log.info("%s: W&B run %s", info.name, run.url or f"offline, `wandb sync {files}` sends it")
    if info.folder is not None:
        link = {"id": run.id, "project": run.project, "entity": run.entity or None}
        write_link(info.folder, {**link, "url": run.url, "files": str(files)})
    return WandbBackend(run, info, upload=settings.upload)


def _mode(settings: LoggerSettings) -> str:
    """Return the mode of a new run: that of the settings, else of WANDB_MODE, else online."""
    if settings.offline is not None:
        return "offline" if settings.offline else "online"
    return os.environ.get("WANDB_MODE") or "online"


def _try_online(settings: LoggerSettings, folder: Path, info: RunInfo) -> wandb.Run | None:
    """Start a run online; None, with one warning, if that cannot be done."""
    global _gave_up
    if _gave_up:
        return None
    url = wandb.setup().settings.base_url
    try:
        if wandb.login(prompt=False, verify=False):
            return _init(settings, folder, info, "online")
        key = _key_without_port(url)
        if key is not None:
            return _init(settings, folder, info, "online", key)
        reason = f"no key found for {url}, see `wandb login`"
    except Exception as error:  # an invalid or refused key, no connection, no answer
        text = (str(error) or type(error).__name__).splitlines()[0]
        reason = f"{url}: {text[:_LONGEST_REASON]}"
        _end_service()  # else the id of the run stays in use
    _gave_up = True
    log.warning(
        "W&B: %s; runs are kept in %s for `wandb sync` (logger.offline=true keeps them there "
        "without this warning, logger=csv uses no W&B)",
        without_secrets(reason),
        folder / "wandb",
    )
    return None


def _key_without_port(url: str) -> str | None:
    """Return the key of a server in netrc, where curl and others name the machine without a port.

    W&B itself looks for the name with the port only.
    """
    host = urlsplit(url).hostname
    try:
        found = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return None
    entry = found.authenticators(host) if host is not None else None
    return entry[2] if entry is not None else None


def _init(
    settings: LoggerSettings, folder: Path, info: RunInfo, mode: Any, key: str | None = None
) -> wandb.Run:
    target = {
        "project": settings.project or os.environ.get("WANDB_PROJECT") or "flash",
        "entity": settings.entity,
        "id": info.id,
        "resume": "allow",
    }
    if os.environ.get("WANDB_SWEEP_ID"):  # the agent of a sweep has chosen them
        target = {}
    group, tags, facts = info.group, dict(info.tags), _facts(info)
    if info.origin is not None:
        group, tags["arch"] = info.origin.study, info.origin.arch
    finish_s = _UPLOAD_TIMEOUT_S if settings.upload else _FINISH_TIMEOUT_S
    own = wandb.Settings(
        silent=True,
        reinit="create_new",
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=finish_s,
        finish_timeout_raises=True,
    )
    if key is not None:
        own.api_key = key
    return wandb.init(
        **target,
        name=info.name,
        dir=folder,
        mode=mode,
        group=settings.group or group,
        job_type=info.job.value,
        tags=[f"{kind}:{value}"[:_LONGEST_TAG] for kind, value in tags.items()],
        config={**info.config, "origin": facts},
        settings=own,
    )
