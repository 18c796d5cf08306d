"""wandb-workspaces: views of a chosen name, panels of lasting ids, and specifications.

Behavior that wandb-workspaces 0.4 does not document, and the reasons to rely on it:

- `Workspace.from_url` reads the entity and the project of the URL's path and the view's id after
  `?nw=`, and nothing of its host: the host of a server is not needed.
- `Workspace.from_url` ends with a `ValueError` whose text holds "not found in project" if the
  project has no such view: distinguishes it from a view that cannot be read.
- `Workspace._internal_name` is the name under which a new view is saved, `nw-ID-v`: gives the view
  an id that the next run knows, where the library would draw one at random.
- `Report.from_url` takes the id of the report after the last `--`, and nothing else of the URL.
- `_id` of panels and of run sets is their id in the specification: a second run sends the same
  one, where the library would draw one at random.
- `_to_model` of both returns what would be sent, whose `spec` is the specification.
- wandb 0.31 raises `WandbApiFailedError`, which is no `wandb.Error`, when a request fails.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import wandb
import wandb_workspaces.workspaces as ws
from wandb.sdk.lib.service.service_connection import WandbApiFailedError
from wandb_workspaces.reports.v2 import interface as wr

API_ERRORS = (wandb.Error, WandbApiFailedError)
"""Errors of requests: a refused key, a server that is not reached, or one that says no."""


def find_workspace(entity: str, project: str, view: str) -> ws.Workspace | None:
    """Read the view of a project that has the id `view`; None if there is none."""
    try:
        return ws.Workspace.from_url(f"/{entity}/{project}?nw={view}")
    except ValueError as error:
        if "not found in project" in str(error):
            return None
        raise


def new_workspace(entity: str, project: str, view: str) -> ws.Workspace:
    """Make a workspace that will be saved as the view with the id `view`."""
    workspace = ws.Workspace(entity=entity, project=project)
    workspace._internal_name = f"nw-{view}-v"
    return workspace


def read_report(entity: str, project: str, identifier: str) -> wr.Report:
    """Read the report of a project that has this id."""
    report = wr.Report.from_url(f"/{entity}/{project}/reports/report--{identifier}")
    assert isinstance(report, wr.Report)
    return report


def set_ids(items: Iterable[Any], place: str) -> None:
    """Give panels or run sets ids that depend only on `place` and their order."""
    for index, item in enumerate(items):
        digest = hashlib.sha256(f"{place}/{index}".encode()).hexdigest()
        item._id = digest[:12]


def specification(dashboard: ws.Workspace | wr.Report) -> dict[str, Any]:
    """Return the specification of a workspace or a report as JSON values."""
    spec = dashboard._to_model().spec
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True)
