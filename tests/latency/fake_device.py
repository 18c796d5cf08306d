"""Fake device with known latencies; its "programs" are descriptions of their subjects."""

import json
from types import SimpleNamespace

from flash.device.measurement import Latency, Measurement
from flash.device.workload import Workload

WORKLOAD = Workload(prompts=[64], contexts=[64], decode_tokens=4)
CALL_MS = 0.05


def block_ms(kind, spec):
    """Latency of a block in prefill [ms]; in decode the FFN has a fourth of the work."""
    d, f = spec["model_dim"], spec["ffn_dim"]
    halves = 2 if kind.endswith("_pair") else 0.5 if kind.endswith("_last") else 1
    return {
        "ends": 0.2 + 1e-3 * d,
        "ffn": 2e-6 * d * f,
        "full": halves * (0.2 + 3e-3 * d),
        "sliding": halves * (0.4 + 3e-3 * d),
    }[kind.split("_")[0]]


def latency_ms(subject):
    if "kind" in subject:
        return CALL_MS + block_ms(subject["kind"], subject["spec"])
    layers = [kind for kind in subject["layer_types"] if kind != "skip_attention"]
    kinds = ["ends", *["ffn"] * len(subject["layer_types"]), *layers]
    return CALL_MS + 1.1 * sum(block_ms(kind, subject) for kind in kinds)


class Killed(BaseException):
    pass


class FakeDevice:
    """Device whose "programs" are descriptions of their subjects, with known latencies."""

    times_blocks = True

    def __init__(
        self,
        die_at_group=None,
        name="fake",
        reference_ms=lambda group: 10.0,
        slowdown=False,
        others_s=0.0,
        latency=latency_ms,
    ):
        self.settings = SimpleNamespace(processes=3, warmups=1, runs=2)
        self.name = self.resource = name
        self.measured = []
        self.groups = 0
        self.die_at_group = die_at_group
        self.reference_ms = reference_ms
        self.slowdown = slowdown
        self.others_s = others_s
        self.latency = latency

    def identity(self):
        return {"device": self.name, "threads": 1}

    def measure(self, programs, workload, reference=None, on_progress=None):
        assert set(workload.points) <= set(WORKLOAD.points)
        if self.groups == self.die_at_group:
            raise Killed
        reference_ms = self.reference_ms(self.groups)
        self.groups += 1
        everything = [*programs, *([] if reference is None else [reference])]
        assert len({program.name for program in everything}) == len(everything)
        if on_progress is not None:
            on_progress(1, 1)
        beside = None
        if reference is not None:
            beside = {"prefill_64": reference_ms, "decode_64": 1.0}
        return [self.time(program, reference_ms, beside) for program in programs]

    def time(self, program, reference_ms, beside):
        subject = json.loads(program.path.read_text())
        self.measured.append(json.dumps(subject, sort_keys=True))
        ms = self.latency(subject) * (reference_ms / 10.0 if self.slowdown else 1.0)
        return Measurement(
            name=program.name,
            latencies={
                "prefill_64": Latency(ms=ms, se_ms=0.01 * ms),
                "decode_64": Latency(ms=ms / 4, se_ms=0.01 * ms),
            },
            load_ms=1.0,
            peak_rss_mib=1.0,
            model_rss_mib=1.0,
            samples=[
                {
                    "accepted": True,
                    "prefill_64": [{"wall_s": ms / 1e3}] * 2,
                    "decode_64": [{"wall_s": ms / 1e3, "steps_ms": [ms / 4] * 4}] * 2,
                }
            ]
            * 3,
            conditions=[
                {
                    "started": self.groups + process / 4,
                    "process": {"wall_s": 10.0, "others_s": self.others_s},
                    **({"reference_ms": beside} if beside is not None else {}),
                }
                for process in range(3)
            ],
        )
