"""Contract tests of wandb-workspaces for flash.compat.wandb_workspaces."""

import json
from typing import Any

import pytest
import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.workspaces import internal

from tests.compat.contract import contract


class FakeApi:
    """Client whose requests are kept; one view is on the server."""

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        self.nodes, self.requests = nodes, []
        self._service_api = self

    def execute_graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(variables)
        edges = [{"node": node} for node in self.nodes]
        return {"project": {"allViews": {"edges": edges}}}


def test_a_workspace_is_found_under_the_id_that_it_was_given(monkeypatch):
    with contract(
        "Workspace._internal_name, or the URLs that Workspace.from_url takes,",
        "flash.compat.wandb_workspaces.find_workspace",
        "update a view and not make another one",
    ):
        from flash.compat.wandb_workspaces import find_workspace, new_workspace, specification

        made = new_workspace("team", "phones", "0123456789a")
        spec = json.dumps(specification(made))
        api = FakeApi([{"id": "Vmlldzox", "displayName": "flash", "spec": spec}])
        monkeypatch.setattr(wandb, "Api", lambda: api)
        found = find_workspace("team", "phones", "0123456789a")
        assert found is not None
        assert (found.entity, found.project) == ("team", "phones")
        assert (found._internal_name, found._internal_id) == (made._internal_name, "Vmlldzox")
        assert api.requests[0]["viewName"] == made._internal_name


def test_a_missing_workspace_is_told_from_one_that_cannot_be_read(monkeypatch):
    with contract(
        "the error of Workspace.from_url for a missing view",
        "flash.compat.wandb_workspaces.find_workspace",
        "make a view where there is none",
    ):
        from flash.compat.wandb_workspaces import find_workspace

        monkeypatch.setattr(wandb, "Api", lambda: FakeApi([]))
        assert find_workspace("team", "phones", "0123456789a") is None
        damaged = FakeApi([{"id": "Vmlldzox", "displayName": "flash", "spec": '{"section": 1}'}])
        monkeypatch.setattr(wandb, "Api", lambda: damaged)
        with pytest.raises(ValueError, match="section"):
            find_workspace("team", "phones", "0123456789a")


def test_ids_of_panels_and_run_sets_are_those_of_the_specification():
    with contract(
        "_id of panels and run sets",
        "flash.compat.wandb_workspaces.set_ids",
        "send the same specification twice",
    ):
        from flash.compat.wandb_workspaces import set_ids, specification

        def grid() -> dict[str, Any]:
            panels, runset = [wr.LinePlot(y=["a"]), wr.BarPlot(metrics=["b"])], wr.Runset()
            set_ids(panels, "panels")
            set_ids([runset], "runs")
            blocks = [wr.PanelGrid(panels=panels, runsets=[runset])]
            return specification(wr.Report(entity="team", project="phones", blocks=blocks))

        first = grid()
        assert first == grid()
        metadata = next(each for each in first["blocks"] if "metadata" in each)["metadata"]
        panels = metadata["panelBankSectionConfig"]["panels"]
        assert len({*(each["__id__"] for each in panels), metadata["runSets"][0]["id"]}) == 3


def test_the_specification_is_what_is_saved(monkeypatch):
    with contract(
        "_to_model of workspaces",
        "flash.compat.wandb_workspaces.specification",
        "write what would be sent to a file",
    ):
        from flash.compat.wandb_workspaces import specification

        views = []

        def upsert(view: internal.View) -> dict[str, Any]:
            views.append(view)
            return {"upsertView": {"view": {"id": "Vmlldzox", "name": view.name}}}

        monkeypatch.setattr(internal, "upsert_view2", upsert)
        monkeypatch.setattr(ws.Workspace, "url", "")
        workspace = ws.Workspace(entity="team", project="phones")
        workspace.save()
        assert views[0].spec == workspace._to_model().spec
        assert specification(workspace) == views[0].spec.model_dump(
            mode="json", by_alias=True, exclude_none=True
        )


def test_a_report_is_read_by_its_id(monkeypatch):
    with contract(
        "the URLs that Report.from_url takes",
        "flash.compat.wandb_workspaces.read_report",
        "update a report and not make another one",
    ):
        from wandb_workspaces.reports.v2 import interface

        from flash.compat.wandb_workspaces import read_report

        asked = []

        def answer(api: object, query: str, variables: dict[str, Any]) -> dict[str, Any]:
            asked.append(variables)
            project = {"id": "1", "name": "phones", "entityName": "team"}
            return {"view": {"id": "VmlldzoxMA==", "project": project, "spec": "{}"}}

        monkeypatch.setattr(interface, "execute_graphql", answer)
        monkeypatch.setattr(interface, "_get_api", lambda: None)
        report = read_report("team", "phones", "VmlldzoxMA==")
        assert (report.id, report.entity, report.project) == ("VmlldzoxMA==", "team", "phones")
        assert asked == [{"reportId": "VmlldzoxMA=="}]


def test_failed_requests_have_one_of_two_classes():
    with contract(
        "WandbApiFailedError",
        "flash.compat.wandb_workspaces.API_ERRORS",
        "explain a refused key or request in one line",
    ):
        from wandb.apis.public import service_api

        from flash.compat.wandb_workspaces import API_ERRORS

        assert set(API_ERRORS) == {wandb.Error, service_api.WandbApiFailedError}
        assert issubclass(wandb.errors.AuthenticationError, wandb.Error)
        assert issubclass(wandb.errors.UsageError, wandb.Error)
