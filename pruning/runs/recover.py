"""A pruned model trained to win back what it lost, and its exports."""

import dataclasses
import datetime
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.checkpoint import open_checkpoint
from moe_jax.stream import LayerSource
from pruning.budget.record import tool_version
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference
from pruning.recipe.recover_options import RecoverOptions
from pruning.recovery.deltas import Deltas, rounded
from pruning.recovery.fit import Course, TrainingText, first_deltas, fit
from pruning.recovery.forward import layer_deltas
from pruning.recovery.layerwise import fit_layers
from pruning.recovery.loss import predicted
from pruning.recovery.teacher import read_predictions, write_predictions
from pruning.report.recovery import NAME, RecoveryReport
from pruning.runs.places import refuse_processes
from pruning.stages.adapter import FOLDER as ADAPTER
from pruning.stages.adapter import write_adapter
from pruning.stages.card import write_card
from pruning.stages.checks import Check, require_verified
from pruning.stages.measure import measure
from pruning.stages.probe_windows import random_probe
from pruning.stages.recover_folder import RecoverFolder
from pruning.stages.recover_job import RecoverJob, check_recovery, open_recovery
from pruning.stages.recovered import (
    load_deltas,
    recovered_source,
    save_deltas,
    write_recovered,
)
from pruning.stages.repair import repair_facts
from pruning.stages.sizes import folder_bytes
from pruning.stages.verify import verify_export
from pruning.stages.writer import only_writer


def recover(
    folder: str | os.PathLike, *, steps: Steps | None = None, **options: Any
) -> RecoveryReport:
    """Train a pruned model on text and export it.

    The dense model runs once, before the student is read; the two are never in memory together.
    An interrupted run is repeated with the same options and goes on where it stood; of a finished
    one the report is read again.

    Args:
      folder: output folder of `compress` or `apply`, or one of its exports.
      steps: where progress goes; default stderr.
      options: fields of `RecoverOptions`; `text` and `output` at least.

    Returns:
      The report, which is also in the output folder, beside exports/.

    Raises:
      InputError: bad input, before any expensive work, another process writes there, or several
        were started.
      FullDiskError: the disk is full; what is finished stays.
      VerificationError: an export differs from the model in memory.
    """
    asked = RecoverOptions(**options)
    refuse_processes("recover trains in one process")
    with only_writer(asked.output):
        return _recover(Path(folder), asked.filled(), steps or Steps())


def _recover(folder: Path, options: RecoverOptions, steps: Steps) -> RecoveryReport:
    with steps.bar("open"):
        run = open_recovery(folder, options, steps)
    place = RecoverFolder(folder, run)
    if place.is_finished():
        report = RecoveryReport.load(run.output / NAME)
        steps.say(f"this run is finished since {report.environment['date']}; --overwrite repeats")
        place.clear_working_files()  # of a run killed in its last moment
        require_verified([Check(**check) for check in report.verification])
        return report
    check_recovery(run, steps)
    place.prepare()
    deltas, training = _trained(run, place, steps)
    model = recovered_source(run.student.source, deltas, run.deltas)
    if run.options.adapter:
        write_adapter(run.student, deltas, run.deltas, run.output / ADAPTER)
    rows = run.card_rows(training)
    checks: list[Check] = []
    for name, form in run.forms.items():
        target = run.output / "exports" / name
        stored = recovered_source(run.student.source, deltas, run.deltas, form)
        if not target.exists():
            write_recovered(run.student, stored, form, target, rows, steps)
        with steps.bar(f"verify {name}"):
            checks += verify_export(
                run.student.base, run.student.plan, form, target, random_probe(run.student.base),
                model=stored,
            )  # fmt: skip
    quality = _quality(run, model, steps)
    report = _report(run, place, training, quality, checks, steps)
    for name, form in run.forms.items():
        write_card(
            run.output / "exports" / name, run.student.base, run.student.plan, form,
            quantizer="rtn", repair=repair_facts(run.student.repair), quality=quality,
            recovery=rows,
            evaluation=run.evaluated,
            verification=report.verification,
        )  # fmt: skip
    report.save(run.output)
    place.clear_working_files()
    require_verified(checks)
    return report


def _trained(run: RecoverJob, place: RecoverFolder, steps: Steps) -> tuple[Deltas, dict[str, Any]]:
    """The trained changes, and what training took; read again if that is done already."""
    if place.deltas.is_file():
        return load_deltas(place.deltas, run.student.source, run.deltas), place.training()
    text, held = _texts(run, place, steps)
    with steps.bar("train") as on_step, place.session(on_step) as on_step:
        course = Course(text, held, run.deltas, run.how, place.checkpoints, on_step)
        if run.options.mode == "layer":
            student = run.student.source
            deltas = fit_layers(run.student.base, student, course, on_layer=place.log_layer)
        else:
            deltas = _fit(run, course, place)
    planned = course.schedule.steps
    done = max((row["step"] for row in place.history() if "step" in row), default=planned)
    training = place.finish_training({
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(deltas)),
        "steps": done,
        "tokens_seen": run.text.total * run.how.epochs * done // planned,
    })  # fmt: skip
    save_deltas(place.deltas, deltas)
    return deltas, training


def _fit(run: RecoverJob, course: Course, place: RecoverFolder) -> Deltas:
    """Train the student in memory end to end."""
    model, group = run.student.resident(), run.deltas.group_size
    if group is not None:
        first = first_deltas(model, run.deltas, run.how.seed)
        layers = (
            rounded(one, layer_deltas(first, index), group)
            for index, one in enumerate(model.layers)
        )
        model = dataclasses.replace(model, layers=tuple(layers))
    rate = course.schedule.schedule()

    def log(step: int, means: dict[str, float]) -> None:
        place.log(step, means | {"learning_rate": np.asarray(rate(step - 1)).item()})

    return fit(model, course, on_log=log, on_held_out=place.log_held_out)


def _texts(
    run: RecoverJob, place: RecoverFolder, steps: Steps
) -> tuple[TrainingText, TrainingText]:
    """What is trained and measured on, with the dense model's predictions, made if they lack."""
    both, predictions = (run.text, run.held), None
    if run.learns_predictions:
        file = place.predictions()
        if not file.is_file():
            tokens, valid = (
                np.concatenate([getattr(one, name) for one in both]) for name in ("tokens", "valid")
            )
            with steps.bar("predictions of the dense model") as on_step:
                write_predictions(
                    file, run.student.base, tokens, valid, run.options.top,
                    batch=run.options.batch, dtype=run.how.dtype, on_layer=on_step,
                )  # fmt: skip
        predictions = read_predictions(file)
    count = len(run.text.tokens)
    return tuple(
        TrainingText(
            one.tokens, one.valid, predicted(one.valid, one.counted),
            None if predictions is None else predictions[part],
        )
        for one, part in zip(both, (slice(count), slice(count, None)), strict=True)
    )  # type: ignore[return-value]  # fmt: skip


def _quality(run: RecoverJob, model: LayerSource, steps: Steps) -> dict[str, dict[str, dict]]:
    """Likelihood of the evaluation texts under every model."""
    texts, how = run.evaluation, {"batch": run.options.batch, "dtype": run.how.dtype}
    sources: dict[str, LayerSource] = {"dense": run.student.base, "pruned": run.student.source}
    sources["recovered"] = model
    for name in run.forms:
        sources[name] = open_checkpoint(run.output / "exports" / name)
    references: dict[str, Reference] = {}
    measured = {
        name: measure(source, texts, references, steps, name, **how)
        for name, source in sources.items()
    }
    return {
        text: {name: found[text].to_dict() for name, found in measured.items()} for text in texts
    }


def _report(
    run: RecoverJob,
    place: RecoverFolder,
    training: dict[str, Any],
    quality: dict,
    checks: list[Check],
    steps: Steps,
) -> RecoveryReport:
    student, exports = run.student, run.output / "exports"
    return RecoveryReport(
        student={
            "folder": str(student.folder),
            "model": str(student.base.about.folder),
            "fingerprint": student.base.fingerprint,
            "plan": student.plan.content_hash,
            "repair": repair_facts(student.repair),
            "removed": 1 - student.plan.keep.mean().item(),
        },
        options=place.told(run.options),
        text={
            "sources": list(run.text.sources),
            "tokens": run.text.total,
            "held_out": run.held.total,
            "seen": run.seen,
        },
        training=training,
        history=place.history(),
        quality=quality,
        exports={name: folder_bytes(exports / name) for name in run.forms},
        verification=[dataclasses.asdict(check) for check in checks],
        stages=steps.stages,
        environment={
            "moe-jax": tool_version(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        },
    )
