"""Entry point of `export.py`: lower, check against the float model, measure, generate text."""

import dataclasses
import logging
import time
from pathlib import Path

from flash.arch import Quantization, count_parameters
from flash.commands import following, override
from flash.device.factory import open_device, text_device
from flash.device.measurement import Measurement, Program
from flash.errors import CheckFailed, shown
from flash.export.formats import FILES, ExportSource, find_published, publish
from flash.export.job import ExportJob
from flash.export.mixed import cost_table, mixed_lowering
from flash.export.pending import PendingExport
from flash.export.perplexity import program_quality
from flash.export.predicted import predicted_latencies
from flash.export.random_weights import RANDOM, measure_shape, shape_of, shape_results
from flash.export.result import ExportResult, ProgramQuality, device_conditions
from flash.export.rounding import FailedRounding, rounded_decoder, trained_rounding
from flash.export.settings import ExportFormat, ExportSettings
from flash.export.summary import describe, describe_format, one_line
from flash.export.table6 import table6
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject
from flash.latency.store import MeasurementStore
from flash.lowering.bisect_layers import locate_failure
from flash.lowering.gate import GateReport, check_parity
from flash.lowering.lower import STAGE_SHARES, lower
from flash.lowering.rounding_check import RoundingCheck, check_rounding
from flash.model.checkpoint import load as load_checkpoint
from flash.model.decoder import Decoder
from flash.outcome import note
from flash.paths import Runs
from flash.progress import stages
from flash.prune.importance import fingerprint
from flash.records import digest, plain, write_json
from flash.tracking.artifacts import Artifact, ArtifactKind, weights_artifact
from flash.tracking.backend import JobType, RunInfo
from flash.tracking.origin import find_origin
from flash.tracking.tracker import Tracker, open_tracker
from flash.training.validation import validate
from flash.workspace import one_at_a_time, result_name

log = logging.getLogger(__name__)


def check(settings: ExportSettings) -> None:
    """Check what an export needs, as far as possible before any work.

    Raises:
        InputError: Settings or weights cannot be used, or a stored result is damaged.
    """
    if settings.model == RANDOM:
        shape_of(settings.arch, settings.backbone, settings.model)
    else:
        ExportJob.open(settings, Runs(Path(settings.runs))).check_settings()


def export(settings: ExportSettings) -> ExportResult | None:
    """Export, check and measure one model, or return the result of the same earlier export.

    Returns:
        The result for the program; None if `format` does not include it, or if only the latency of
        a shape is measured.

    Raises:
        InputError: Settings or weights cannot be used.
        CheckFailed: The outputs of a format differ from the model's; names the first bad stage.
        DeviceError: A process on the device died or took too long.
    """
    runs = Runs(Path(settings.runs))
    if settings.model == RANDOM:
        _measure_shape(settings, runs)
        return None
    job = ExportJob.open(settings, runs)
    job.check()
    with one_at_a_time(job.folder, job.name):
        return _export_missing(job)


def _export_missing(job: ExportJob) -> ExportResult | None:
    """Write the formats that are not finished."""
    settings = job.settings
    job.check_kept()
    missing = [kind for kind in settings.format if not _is_finished(job, kind)]
    with _open_tracker(job) if missing else Tracker(None, job.name) as tracker:
        others = [kind for kind in settings.format if kind is not ExportFormat.executorch]
        if others:
            _publish(job, others, tracker)
        if ExportFormat.executorch not in settings.format:
            return None
        new = ExportFormat.executorch in missing
        if new:
            result = _export(job)
            tracker.log(_metrics(result))
            tracker.publish(_artifact(job, ExportFormat.executorch))
        else:
            result = ExportResult.read(job.folder)
            log.info("%s is finished: %s", job.name, job.folder / "model.pte")
        assert result is not None
        if job.reference is not None and result.reference is None:
            log.info(
                "%s: no speed-up over %s, which was exported later; name=NEW measures both",
                job.name,
                job.reference.name,
            )
        note(one_line(result), again=not new)
        describe(result, job.folder)
    return result


def _is_finished(job: ExportJob, kind: ExportFormat) -> bool:
    """Return True if a format was made earlier of the same weights with the same settings."""
    if kind is not ExportFormat.executorch:
        return find_published(kind, job.folder, job.keys[kind]) is not None
    result = ExportResult.read(job.folder)
    same = result is not None and result.key == job.key
    return same and (job.folder / FILES[kind]).is_file()


def _measure_shape(settings: ExportSettings, runs: Runs) -> None:
    shape = shape_of(settings.arch, settings.backbone, settings.model)
    device = open_device(settings.device)
    measure_shape(result_name(settings), shape, device, runs)
    print(f"\n{table6(shape_results(runs, device))}")


def _publish(job: ExportJob, kinds: list[ExportFormat], tracker: Tracker) -> None:
    """Write and check the formats other than the program."""
    model = load_checkpoint(job.weights)
    trained = trained_rounding(job.weights)
    source = ExportSource(
        model=model,
        text=job.texts[0],
        tokenizer=job.workspace.tokenizer,
        metadata=trained.to_metadata() if trained is not None else {},
    )
    for kind in kinds:
        new = not _is_finished(job, kind)
        result = publish(kind, job.folder, source, job.settings.formats, job.keys[kind])
        if new:
            tracker.publish(_artifact(job, kind))
        describe_format(job.name, kind, result, job.folder)
        note(f"{job.folder / FILES[kind]}, {result.size_bytes / 2**20:.2f} MiB")


def _export(job: ExportJob) -> ExportResult:
    settings, name, workspace = job.settings, job.name, job.workspace
    model = load_checkpoint(job.weights)
    log.info("%s: %s for %s", name, model.spec, settings.device.name)
    key = job.key  # by the settings as they were given
    pending = PendingExport.open(job.folder, key)
    job, pending = _choose_parts(job, model, pending)
    lowering = job.lowering
    predicted = predicted_latencies(workspace.runs, job.device, lowering, job.spec)
    if pending.gate:
        log.info("%s: going on with the program that has passed the parity gate", name)
    else:
        rounded, rounding = _round(job, model)
        del model  # memory peaks in the lowering
        pending = _lower(job, rounded, rounding, pending)
        del rounded
        model = load_checkpoint(job.weights)
    texts, path = text_device(job.device), pending.program
    quality = program_quality(model, path, texts, job.texts)
    _check_program(job, quality, pending)
    measurement = _measure(job, pending)
    reference, conditions = job.reference, device_conditions(job.device, job.settings.device)
    if reference is None:  # the backbone itself shows the state of the machine
        alike, timed_ms = job.spec, {key: each.ms for key, each in measurement.latencies.items()}
    else:
        alike = reference.spec if reference.conditions == conditions else None
        timed_ms = measurement.reference_ms
    ids = texts.generate(path, job.prompt, settings.new_tokens, stop=workspace.tokenizer.ends)
    result = ExportResult(
        name=name,
        spec=model.spec,
        parameters=count_parameters(model.spec).total,
        quality=validate(model, workspace.data, settings.trainer.precision),
        program_quality=quality,
        pte_bytes=path.stat().st_size,
        gate=pending.gate,
        measurement=measurement,
        reference=reference.name if reference else None,
        speedups={
            point: ms / measurement.latencies[point].ms
            for point, ms in measurement.reference_ms.items()
        },
        predicted=predicted and predicted.at(alike, timed_ms),
        prompt=settings.prompt,
        completion=workspace.tokenizer.decode(ids),
        device=job.device.identity(),
        lower_s=pending.lower_s,
        key=key,
        weights=fingerprint(job.weights),
        conditions=conditions,
    )
    pending.publish()
    result.write(job.folder)
    pending.discard()
    return result


def _lower(
    job: ExportJob, rounded: Decoder, rounding: RoundingCheck | None, pending: PendingExport
) -> PendingExport:
    """Lower the rounded decoder, and keep the program once it has passed the parity gate."""
    start = time.perf_counter()
    ends = job.workspace.tokenizer.ends
    with stages(f"{job.name}: lowering", STAGE_SHARES):
        program = lower(rounded, job.lowering, bos_id=job.begin_id, eos_ids=ends)
    lower_s = time.perf_counter() - start
    log.info("%s: %.1f MiB in %.0f s", job.name, len(program) / 2**20, lower_s)
    with stages(f"{job.name}: parity gate"):
        report = _run_gate(job, rounded, rounding, program)
    log.info("%s: parity gate\n%s", job.name, report)
    return pending.with_program(program, report.to_dict(), lower_s)


def _choose_parts(
    job: ExportJob, model: Decoder, pending: PendingExport
) -> tuple[ExportJob, PendingExport]:
    """Name the parts in 8 bits in the job's settings, if a limit of `mixed` asks for the choice."""
    settings = job.settings
    if settings.mixed.off:
        return job, pending
    if pending.eight_bit is None:
        parts, costs = mixed_lowering(
            model,
            job.lowering,
            settings.mixed,
            job.rounding,
            job.calibration,
            job.device,
            job.workspace.runs.lowered,
        )
        pending = pending.with_choice(parts, costs)
    chosen = pending.eight_bit or []
    log.info("%s: mixed precision\n%s", job.name, cost_table(pending.costs, chosen))
    lowering = dataclasses.replace(job.lowering, eight_bit=chosen)
    device = dataclasses.replace(settings.device, lowering=lowering)
    return dataclasses.replace(job, settings=dataclasses.replace(settings, device=device)), pending


def _round(job: ExportJob, model: Decoder) -> tuple[Decoder, RoundingCheck | None]:
    """Round the weights, and compare the rounded decoder with the float one before the lowering.

    Raises:
        CheckFailed: They differ too much; says where, what other roundings lose, and what to do.
    """
    lowering, gate, choice = job.lowering, job.settings.gate, job.rounding
    if lowering.quantization is Quantization.fp32:
        return model, None
    calibration = job.calibration
    log.info("%s: rounding by %s", job.name, choice)
    rounded = rounded_decoder(model, lowering, choice, calibration)
    check = check_rounding(model, rounded, job.texts, gate)
    log.info("%s: %s", job.name, check)
    if check.passed:
        return rounded, check
    failed = FailedRounding(
        model=model,
        rounded=rounded,
        lowering=lowering,
        choice=choice,
        check=check,
        texts=job.texts,
        gate=gate,
        calibration=calibration,
        mixed=not job.settings.mixed.off,
    )
    path, where = job.folder / "gate_failed.json", failed.where()
    write_json(path, GateReport(stages=[], rounding=check, where=where).to_dict())
    raise CheckFailed(
        f"{job.name}: the parity gate failed before the lowering, {where}; nothing was published, "
        f"see {path}\n{failed.remedy(_training_commands(job))}"
    )


def _training_commands(job: ExportJob) -> list[str]:
    """Return the commands that train the weights for their rounding, and export the result."""
    lowering, name = job.lowering, f"{job.name}-qat"
    training = [
        "recipe=qat",
        override("start", job.weights),
        override("name", name),
        f"recipe.qat_group_size={lowering.group_size}",
        f"recipe.qat_embedding_bits={lowering.embedding_bits}",
    ]
    if lowering.rotate is not None:
        training.append(f"recipe.qat_rotate={shown(lowering.rotate)}")
    shared = ("backbone", "data", "trainer", "logger", "seed", "runs")
    own = ("device", "gate", "mixed", "format", "formats", "prompt", "new_tokens")
    exporting = [override("model", name), override("name", name)]
    return [
        following("train", training, shared),
        following("export", exporting, (*shared, *own, "perplexity_tokens", "experiment")),
    ]


def _run_gate(
    job: ExportJob, rounded: Decoder, rounding: RoundingCheck | None, program: bytes
) -> GateReport:
    """Run the parity gate of the program; the report of a failure is stored as gate_failed.json.

    Raises:
        CheckFailed: The gate failed; names the stage and the first bad part of the model.
    """
    lowering, gate = job.lowering, job.settings.gate
    report = check_parity(rounded, lowering, job.texts[0], gate, program=program)
    report = dataclasses.replace(report, rounding=rounding)
    stage = report.first_failure
    if stage is None:
        return report
    path = job.folder / "gate_failed.json"
    write_json(path, report.to_dict())  # the search for the layer takes minutes
    where = locate_failure(rounded, lowering, job.texts[0], gate, stage)
    report = dataclasses.replace(report, where=where)
    write_json(path, report.to_dict())
    raise CheckFailed(
        f"{job.name}: the parity gate failed at stage {stage.value}, {where}; nothing was "
        f"published, see {path}\n{report}"
    )


def _check_program(job: ExportJob, quality: ProgramQuality, pending: PendingExport) -> None:
    """Judge the perplexity of the file as that of the rounded decoder was.

    Raises:
        CheckFailed: It is beyond the limit; the file is removed.
    """
    most = job.settings.gate.perplexity_limit(count_parameters(job.spec).total)
    change = quality.change
    if change.perplexity_pct <= most:  # NaN is not
        return
    path, where = job.folder / "gate_failed.json", f"as .pte, perplexity is {change}"
    write_json(path, {**pending.gate, "passed": False, "where": where})
    pending.discard()
    cache = job.lowering.cache.value
    raise CheckFailed(
        f"{job.name}: {where} on {change.tokens} tokens, though the rounded decoder's was within "
        f"gate.max_perplexity_increase_pct={most:g}; nothing was published, see {path}: what was "
        f"added is the {cache} cache and the kernels' own rounding; raise the limit"
        + ("" if cache == "fp32" else ", or give device.lowering.cache=fp32")
    )


def _measure(job: ExportJob, pending: PendingExport) -> Measurement:
    """Measure latencies, and those of the reference program in the same processes."""
    settings, runs = job.settings, job.workspace.runs
    vocab_size = job.spec.vocab_size
    reference = None
    if job.reference is not None:
        path = runs.export(job.reference.name) / "model.pte"
        other = Program(name="reference", path=path, vocab_size=vocab_size)
        reference = Subject.of(job.reference.spec), other
    profiler = Profiler(
        device=job.device,
        workload=settings.device.workload,
        lowering=settings.device.lowering,
        store=MeasurementStore(runs.measurements),
        cache_dir=runs.lowered,
    )
    program = Program(name=job.name, path=pending.program, vocab_size=vocab_size)
    subject = Subject.of(job.spec)
    measured = profiler.measure_program(subject, program, reference, pending.lower_s)
    limit = settings.mixed.max_decode_ms
    if limit is not None and measured.decode.ms > limit:
        log.warning(
            "%s: a decode step takes %.3g ms, more than mixed.max_decode_ms=%g, as times of parts "
            "add up only roughly; a lower limit leaves more parts in 4 bits",
            *(job.name, measured.decode.ms, limit),
        )
    return measured


def _open_tracker(job: ExportJob) -> Tracker:
    """Open the tracker of an export, and record the weights that it reads."""
    settings, backbone, runs = job.settings, job.workspace.backbone, job.workspace.runs
    info = RunInfo(
        job=JobType.export,
        name=job.name,
        key=digest({kind.value: key for kind, key in job.keys.items()}),
        group=backbone.name,
        tags={"backbone": backbone.name, "device": settings.device.name, "arch": job.name},
        config={**plain(settings), "spec": job.spec.to_dict()},
        origin=find_origin(runs, job.name, job.spec),
        folder=job.folder,
    )
    tracker = open_tracker(settings.logger, runs.logs, info)
    tracker.use(weights_artifact(job.weights, backbone.name, backbone.folder))
    return tracker


def _artifact(job: ExportJob, kind: ExportFormat) -> Artifact:
    """Describe the published file or folder of a format."""
    about = {"device": job.settings.device.name} if kind is ExportFormat.executorch else {}
    return Artifact(ArtifactKind[kind.name], job.name, job.folder / FILES[kind], about)


def _metrics(result: ExportResult) -> dict[str, float]:
    """Figures of an export: latencies as measured and as predicted, speedups, size and quality."""
    measured = result.measurement
    predicted = {
        f"export/{point}_predicted{bound}_ms": values[f"{key}_ms"]
        for point, values in (result.predicted or {}).items()
        for bound, key in (("", "mean"), ("_low", "low"), ("_high", "high"))
    }
    return {
        **{f"export/{name}_ms": latency.ms for name, latency in measured.latencies.items()},
        **{f"export/{name}_se_ms": latency.se_ms for name, latency in measured.latencies.items()},
        **{f"export/{name}_speedup": value for name, value in result.speedups.items()},
        **predicted,
        "export/pte_mib": result.pte_bytes / 2**20,
        "export/val_loss": result.quality.loss,
        "export/perplexity_change_pct": result.program_quality.change.perplexity_pct,
        "export/top1_agreement": result.program_quality.agreement,
    }
