"""Settings of `flash workspace`."""

from dataclasses import dataclass, field

from flash.device.workload import Point, Workload
from flash.errors import InputError, require


@dataclass(kw_only=True)
class WorkspaceSettings:
    """Settings of `flash workspace`."""

    entity: str | None = None
    """W&B team or user; null is that of WANDB_ENTITY, else the default of the key's account."""
    project: str | None = None
    """W&B project that the runs are logged to; null is that of WANDB_PROJECT, else `flash`."""
    points: list[str] = field(default_factory=lambda: [each.name for each in Workload().points])
    """Latencies that the panels show: the prompt lengths and cache positions of the exports'
    `device.workload`. The first is the latency axis of the winners."""
    file: str | None = None
    """JSON file for the specifications of both; nothing is then sent, and no key is needed."""

    def __post_init__(self) -> None:
        require(bool(self.points), "points", "[]", "a latency such as prefill_512")
        distinct = len(set(self.points)) == len(self.points)
        require(distinct, "points", self.points, "different latencies")
        for index, name in enumerate(self.points):
            try:
                Point.parse(name)
            except InputError as error:
                raise InputError(f"points[{index}]{str(error).removeprefix('point')}") from None
