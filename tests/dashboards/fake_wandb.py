"""Server that answers the W&B requests of the dashboards and keeps what is sent to it."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = {"endCursor": None, "hasNextPage": False}


@dataclass
class FakeWandb:
    """State of the server: one team with one project, and the views that were saved there."""

    entity: str = "team"
    project: str = "phones"
    key: str = "0" * 40
    url: str = ""
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)
    mutations: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the `data` of a GraphQL request."""
        match = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        assert match, query
        self.operations.append(match[1])
        match match[1]:
            case "Viewer" | "GetDefaultEntity":
                teams = {"edges": [{"node": {"name": self.entity}}]}
                person = {"id": "VXNlcjox", "entity": self.entity, "username": "ada"}
                return {"viewer": {**person, "email": "", "flags": "{}", "teams": teams}}
            case "ProjectViews" | "View":
                name = variables.get("project") or variables["name"]
                if (variables.get("entity") or variables["entityName"], name) != self._path:
                    return {"project": None}
                kind, view = variables.get("viewType", "runs"), variables.get("viewName")
                nodes = [
                    each
                    for each in self.views.values()
                    if each["type"] == kind and view in {None, each["name"]}
                ]
                edges = [{"node": node, "cursor": node["id"]} for node in nodes]
                return {"project": {"allViews": {"edges": edges, "pageInfo": END}}}
            case "SpecificReport":
                return {"view": self.views[variables["reportId"]]}
            case "GetProjects":
                page = {"__typename": "PageInfo", **END}
                return {"models": {"edges": [{"node": self._project}], "pageInfo": page}}
            case "UpsertView2" | "upsertView":
                return {"upsertView": self._upsert(variables)}
        raise AssertionError(f"unexpected request: {match[1]}")

    @property
    def _path(self) -> tuple[str, str]:
        return self.entity, self.project

    @property
    def _project(self) -> dict[str, Any]:
        """Fields of the fragment `ProjectFragment`."""
        base = {"__typename": "Project", "id": "UHJvamVjdDox", "name": self.project}
        about = {"entityName": self.entity, "createdAt": "2026-01-01T00:00:00", "user": None}
        return {**base, **about, "isBenchmark": False}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Save a view under the id of the request, or a new one, as W&B does."""
        assert (variables["entityName"], variables["projectName"]) == self._path
        self.mutations.append(variables)
        number = len(self.views) + 1
        new = base64.b64encode(f"View:{number}".encode()).decode()
        identifier = variables.get("id") or new
        inserted = identifier not in self.views
        keys = ("type", "name", "displayName", "description", "spec")
        view = {key: variables[key] for key in keys}
        project = {"id": "1", "name": self.project, "entityName": self.entity}
        dates = {"createdAt": f"2026-01-{number:02}T00:00:00", "updatedAt": "2026-02-01T00:00:00"}
        saved = {"id": identifier, "project": project, "user": None, **dates, **view}
        self.views[identifier] = saved
        return {"view": saved, "inserted": inserted}


@contextmanager
def serve(state: FakeWandb) -> Iterator[FakeWandb]:
    """Answer requests at `state.url` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/graphql":  # telemetry of the client
                self._reply(404, {})
                return
            request = json.loads(body)
            secret = base64.b64decode(self.headers["Authorization"].removeprefix("Basic "))
            if secret != f"api:{state.key}".encode():
                self._reply(401, {"error": "user is not logged in"})
                return
            try:
                data = state.answer(request["query"], request.get("variables") or {})
                self._reply(200, {"data": data})
            except (AssertionError, LookupError) as error:  # else the client would try again
                self._reply(200, {"errors": [{"message": repr(error)}]})

        def _reply(self, code: int, values: dict[str, Any]) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(values).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
