"""`export.py`: weights -> .pte, parity gate, measurement on the device, text from the artefact."""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from torch import Tensor

from flash.arch import ArchSpec, count_parameters
from flash.data import DataSettings
from flash.device import Device, DeviceSettings, Measurement, Phase, Point, Program, open_device
from flash.errors import CheckFailed, InputError
from flash.evaluation.artefact import ExportResult
from flash.evaluation.perplexity import artefact_quality
from flash.files import write_text
from flash.latency import MeasurementStore, Row, SubjectKind, conditions_of, of_point
from flash.lowering import GateSettings, check_parity, lower, write
from flash.model import Backbone, BackboneSettings, Decoder
from flash.model import load as load_checkpoint
from flash.prune import fingerprint
from flash.runs import Runs
from flash.training import RecipeSettings, TrainerSettings, heldout_quality
from flash.training.loggers import LoggerSettings, close_logger, make_logger
from flash.training.run import Inputs, arch_of, digest, plain

log = logging.getLogger(__name__)

ENDS = ("mean", "low", "high")
"""Of a predicted interval."""


@dataclass(kw_only=True)
class ExportSettings:
    """Root of `export.py`."""

    backbone: BackboneSettings = MISSING
    device: DeviceSettings = MISSING
    data: DataSettings = MISSING
    trainer: TrainerSettings = MISSING
    logger: LoggerSettings = MISSING
    gate: GateSettings = field(default_factory=GateSettings)
    arch: dict[str, Any] = field(default_factory=dict)
    """What to export, as for `train.py`; nothing is the backbone itself."""
    name: str | None = None
    """Name of the result; null takes the arch's."""
    model: str | None = None
    """Folder of trained weights; null takes what `train.py` wrote under the same name."""
    prompt: str = "def main("
    """What the exported program is asked to continue."""
    new_tokens: int = 48
    """Length of its answer [tokens]."""
    perplexity_tokens: int = 512
    """Held-out tokens that the program's own loss is computed on."""
    seed: int = 0
    runs: str = "runs"
    """Folder for everything that runs produce."""


def export(settings: ExportSettings) -> ExportResult:
    """Export, prove and measure one model, or return the finished result of the same export.

    Raises:
        InputError: Settings or weights that cannot be used.
        CheckFailed: The program's answers differ from the model's; names the first bad stage.
    """
    runs, backbone = Runs(Path(settings.runs)), Backbone.open(settings.backbone)
    spec = arch_of(settings.arch, backbone)
    name = settings.name or backbone.name
    weights = _weights(settings, spec, backbone, runs.model(name))
    device = open_device(settings.device)
    recipe = RecipeSettings(name="export", tokens=1)
    inputs = Inputs.open(backbone, settings.data, recipe, seed=settings.seed, runs=runs)
    folder = runs.export(name)
    # A winner is measured in turns with its backbone, if that was exported for the same device.
    reference = None if spec == backbone.spec else _reference(runs.export(backbone.name), device)
    key = _key(settings, weights, device, reference, inputs)
    result = ExportResult.read(folder)
    if result is not None and result.key == key and (folder / "model.pte").is_file():
        log.info("%s is finished: %s", name, folder / "model.pte")
        _describe(result, folder)
        return result
    result = _export(settings, name, weights, device, reference, inputs, key)
    result.write(folder)
    _log(settings, result, runs)
    _describe(result, folder)
    return result


def _weights(settings: ExportSettings, spec: ArchSpec, backbone: Backbone, trained: Path) -> Path:
    """The checkpoint folder to export.

    Raises:
        InputError: There is none yet, or it holds another architecture.
    """
    if settings.model is not None:
        folder = Path(settings.model)
    elif spec == backbone.spec and backbone.folder is not None:
        backbone.fetch()
        folder = backbone.folder
    else:
        folder = trained / "checkpoint"
        if not folder.is_dir():
            raise InputError(
                f"model=null: expected trained weights in {folder}; run train.py with the same "
                "+arch first, or give model=FOLDER"
            )
    found = Backbone.open(BackboneSettings(name="model", weights=str(folder))).spec
    if found != spec:
        raise InputError(f"model={folder}: holds arch {found}: expected {spec}; train it again")
    return folder


def _reference(folder: Path, device: Device) -> ExportResult | None:
    result = ExportResult.read(folder)
    usable = result is not None and result.device == device.identity()
    return result if usable and (folder / "model.pte").is_file() else None


def _key(
    settings: ExportSettings,
    weights: Path,
    device: Device,
    reference: ExportResult | None,
    inputs: Inputs,
) -> str:
    decisive = {
        "weights": fingerprint(weights),
        "device": device.identity(),
        "device_settings": plain(settings.device),
        "gate": plain(settings.gate),
        "text": [settings.prompt, settings.new_tokens, settings.perplexity_tokens],
        "data": [inputs.data.digest, settings.data.heldout_sequences],
        "reference": reference.key if reference else None,
    }
    return digest(decisive)


def _export(
    settings: ExportSettings,
    name: str,
    weights: Path,
    device: Device,
    reference: ExportResult | None,
    inputs: Inputs,
    key: str,
) -> ExportResult:
    folder = inputs.runs.export(name)
    model = load_checkpoint(weights)
    log.info("%s: lowering %s for %s", name, model.spec, settings.device.name)
    start = time.perf_counter()
    end = inputs.end_of_text
    program = lower(model, settings.device.lowering, bos_id=end, eos_ids=(end,))
    lower_s = time.perf_counter() - start
    text = _heldout(inputs, settings)
    report = check_parity(model, settings.device.lowering, text[0], settings.gate, program=program)
    write_text(folder / "gate.json", json.dumps(report.to_dict(), indent=1) + "\n")
    if not report.passed:
        assert report.first_failure is not None
        raise CheckFailed(
            f"{name}: the parity gate failed at stage {report.first_failure.value}; "
            f"nothing was published, see {folder / 'gate.json'}\n{report}"
        )
    write(folder / "model.pte", program)
    log.info("%s: %.1f MiB in %.0f s, measuring", name, len(program) / 2**20, lower_s)
    measurement, speedups = _measure(settings, name, inputs.runs, device, reference, model)
    prompt = inputs.tokenizer.encode(settings.prompt, add_special_tokens=False).ids or [end]
    ids = device.generate(folder / "model.pte", prompt, settings.new_tokens, stop=(end,))
    return ExportResult(
        name=name,
        spec=model.spec,
        parameters=count_parameters(model.spec).total,
        quality=heldout_quality(model, inputs.data, settings.trainer.precision),
        artefact=artefact_quality(model, folder / "model.pte", device, text),
        pte_bytes=len(program),
        gate=report.to_dict(),
        measurement=measurement,
        reference=reference.name if reference else None,
        speedups=speedups,
        predicted=_predicted(inputs.runs, name, model.spec),
        prompt=settings.prompt,
        completion=inputs.tokenizer.decode(ids),
        device=device.identity(),
        lower_s=lower_s,
        key=key,
    )


def _heldout(inputs: Inputs, settings: ExportSettings) -> list[Tensor]:
    """Held-out sequences of about `perplexity_tokens` tokens in all, each fitting the cache."""
    length = min(settings.data.seq_len, settings.device.max_context, settings.perplexity_tokens)
    count = max(1, settings.perplexity_tokens // length)
    heldout = inputs.data.heldout_set
    return [heldout[i].tokens[:length] for i in range(min(count, len(heldout)))]


def _measure(
    settings: ExportSettings,
    name: str,
    runs: Runs,
    device: Device,
    reference: ExportResult | None,
    model: Decoder,
) -> tuple[Measurement, dict[str, float]]:
    """Latencies, and how many times faster than the reference program of the same processes."""
    vocab_size = model.spec.vocab_size
    other = None
    if reference is not None:
        path = runs.export(reference.name) / "model.pte"
        other = Program(name="reference", path=path, vocab_size=vocab_size)
    subject = Program(name=name, path=runs.export(name) / "model.pte", vocab_size=vocab_size)
    measured = device.measure([subject], settings.device.workload, other)[0]
    store = MeasurementStore(runs.measurements)
    workload, lowering = settings.device.workload, settings.device.lowering
    spec = model.spec.replace(tie_embeddings=True)  # tied or not, the programs are the same
    for point in workload.points:
        row = Row(
            kind=SubjectKind.model,
            subject=spec.to_dict(),
            conditions=conditions_of(device, workload, point, lowering),
            result={**of_point(measured, point), "reference": None, "lower_s": None},
        )
        store.append(row)
    if other is None:
        return measured, {}
    kept = [c for c, s in zip(measured.conditions, measured.samples, strict=True) if s["accepted"]]
    speedups = {
        name: min(conditions["reference_ms"][name] for conditions in kept) / latency.ms
        for name, latency in measured.latencies.items()
    }
    return measured, speedups


def _predicted(runs: Runs, name: str, spec: ArchSpec) -> dict[str, Any] | None:
    """What the search that found this arch, or that had this backbone, predicted for it."""
    for path in sorted((runs.root / "studies").glob("*/frontier.json")):
        found = json.loads(path.read_text("utf-8"))
        by_number = {trial["number"]: trial for trial in found["trials"]}
        for number, stem in found["names"].items():
            if stem == name and by_number[int(number)]["spec"] == spec.to_dict():
                return found["predicted"][number]
        backbone = found["backbone"]
        if backbone["name"] == name and backbone["spec"] == spec.to_dict():
            return backbone["predicted"]
    return None


def _log(settings: ExportSettings, result: ExportResult, runs: Runs) -> None:
    logger = make_logger(
        settings.logger,
        folder=runs.logs,
        run=result.name,
        job="export",
        config={**plain(settings), "spec": result.spec.to_dict()},
    )
    if logger is None:
        return
    measured = result.measurement
    metrics = {
        **{f"export/{name}_ms": latency.ms for name, latency in measured.latencies.items()},
        **{f"export/{name}_se_ms": latency.se_ms for name, latency in measured.latencies.items()},
        **{f"export/{name}_speedup": value for name, value in result.speedups.items()},
        "export/pte_mib": result.pte_bytes / 2**20,
        "export/heldout_loss": result.quality.loss,
        "export/perplexity_change_pct": result.artefact.change_pct,
    }
    logger.log_metrics(metrics)
    close_logger(logger)


def _describe(result: ExportResult, folder: Path) -> None:
    measured = result.measurement
    print(f"\n{result.name}: {result.spec}, {result.parameters / 1e6:.2f}M parameters")
    print(f"  program     {folder / 'model.pte'}, {result.pte_bytes / 2**20:.2f} MiB")
    print(
        "  parity      passed: "
        + ", ".join(f"{stage['stage']} kl {stage['kl']:.1e}" for stage in result.gate["stages"])
    )
    for name, latency in measured.latencies.items():
        point = Point.parse(name)
        if point.phase is Phase.prefill:
            text = (
                f"TTFT        {latency.ms:.1f} +- {latency.se_ms:.1f} ms for {point.tokens} tokens"
            )
        else:
            text = (
                f"decode      {latency.ms:.3g} ms a token, {1e3 / latency.ms:.0f} tokens/s at "
                f"context {point.tokens}"
            )
        if name in result.speedups:
            text += f", {result.speedups[name]:.2f}x over {result.reference}"
        if result.predicted is not None and name in result.predicted:
            mean, low, high = (result.predicted[name][f"{end}_ms"] for end in ENDS)
            text += f"; predicted {mean:.3g} [{low:.3g}, {high:.3g}] ms"
        print(f"  {text}")
    print(
        f"  held-out    {result.quality.loss:.3f} nats a token; as .pte, perplexity "
        f"{result.artefact.change_pct:+.1f} % on {result.artefact.tokens} tokens"
    )
    print(f"  it writes   {result.prompt!r} -> {result.completion!r}")
