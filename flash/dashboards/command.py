"""`flash workspace`: make or update the workspace and the report of a W&B project."""

import os
from collections.abc import Sequence
from pathlib import Path

import wandb
import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2 import interface as wr

from flash.compat.wandb_workspaces import (
    API_ERRORS,
    find_workspace,
    new_workspace,
    read_report,
    set_ids,
    specification,
)
from flash.dashboards.sections import sections
from flash.dashboards.settings import WorkspaceSettings
from flash.device.workload import Point
from flash.errors import InputError
from flash.records import digest, write_json

NAME = "flash"
"""Name of the workspace."""
TITLE = "flash overview"
"""Title of the report, by which it is found again."""
_ABOUT = "Written by flash workspace, which replaces all of it: copy the report to change it."
_LOGIN = "log in with `wandb login` (`wandb login --host=URL` for a server of your own)"


def make_dashboards(settings: WorkspaceSettings) -> None:
    """Make or update both dashboards, or write their specifications to a file.

    Raises:
        InputError: There is no key, W&B refuses it, or the project is not there.
    """
    points = [Point.parse(name) for name in settings.points]
    if settings.file is not None:
        _write(Path(settings.file), points)
        return
    os.environ.setdefault("WANDB_SILENT", "true")  # W&B reads it once, when it starts
    project = settings.project or os.environ.get("WANDB_PROJECT") or "flash"
    where = f"entity={settings.entity or 'null'} project={project}"
    try:
        if not wandb.login(prompt=False, verify=False):
            raise InputError(
                f"{where}: W&B is offline or has no key; {_LOGIN}, or write the specifications "
                "with file=dashboards.json"
            )
        api = wandb.Api()
        entity = settings.entity or api.settings["entity"] or api.default_entity
        if entity is None:
            raise InputError(f"{where}: the account has no default entity; give a team or a user")
        _publish(api, entity, project, points)
    except API_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{where}: W&B says: {reason}; correct them, or {_LOGIN}") from error


def _write(path: Path, points: Sequence[Point]) -> None:
    workspace = ws.Workspace(entity="", project="")
    report = wr.Report(entity="", project="", title=TITLE)
    fill_workspace(workspace, points)
    fill_report(report, points)
    specifications = {"workspace": specification(workspace), "report": specification(report)}
    write_json(path, specifications)
    print(f"{path}: specifications of the workspace and the report; nothing was sent")


def _publish(api: wandb.Api, entity: str, project: str, points: Sequence[Point]) -> None:
    identifier = _find_report(api, entity, project)
    if identifier is None:
        report = wr.Report(entity=entity, project=project, title=TITLE)
    else:
        report = read_report(entity, project, identifier)
    view = digest([NAME, entity, project], 11)
    workspace = find_workspace(entity, project, view) or new_workspace(entity, project, view)
    fill_workspace(workspace, points)
    fill_report(report, points)
    print(f"workspace: {workspace.save().url}\nreport: {report.save().url}")


def _find_report(api: wandb.Api, entity: str, project: str) -> str | None:
    """Find the id of the oldest report with our title.

    Raises:
        InputError: The project is not there.
    """
    try:
        reports = list(api.reports(f"{entity}/{project}"))
    except ValueError as error:
        if "does not exist" not in str(error):
            raise
        raise InputError(
            f"entity={entity} project={project}: no such project of W&B; correct them, or log "
            f"a run to it first, as with logger.entity={entity} logger.project={project}"
        ) from error
    ours = [report for report in reports if report.display_name == TITLE]
    return min(ours, key=lambda report: str(report.created_at)).id if ours else None


def fill_workspace(workspace: ws.Workspace, points: Sequence[Point]) -> None:
    """Set the name and our sections; sections of other names stay, below ours."""
    ours = []
    for section in sections(points):
        set_ids(section.panels, f"workspace/{section.name}")
        ours.append(ws.Section(name=section.name, panels=section.panels, is_open=True))
    names = {section.name for section in ours}
    workspace.name = NAME
    workspace.sections = [*ours, *(each for each in workspace.sections if each.name not in names)]


def fill_report(report: wr.Report, points: Sequence[Point]) -> None:
    """Set the description and all blocks."""
    blocks = [wr.P(_ABOUT), wr.TableOfContents()]
    for section in sections(points):
        set_ids(section.panels, f"report/{section.name}")
        runset = wr.Runset(name=section.name, filters=section.runs)
        set_ids([runset], f"runs/{section.name}")
        grid = wr.PanelGrid(runsets=[runset], panels=section.panels)
        blocks += [wr.H1(section.name), wr.P(section.text), grid]
    report.description, report.blocks, report.width = _ABOUT, blocks, "fluid"
