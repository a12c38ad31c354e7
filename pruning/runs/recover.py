"""A pruned model trained to win back what it lost, and its exports."""

import dataclasses
import datetime
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.checkpoint import open_checkpoint
from moe_jax.spread import Spread
from moe_jax.stream import LayerSource
from pruning.budget.record import tool_version
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recover_options import RecoverOptions
from pruning.recovery.course import Course, TrainingText, own_part
from pruning.recovery.deltas import Deltas
from pruning.recovery.fit import fit
from pruning.recovery.layerwise import fit_layers
from pruning.recovery.loss import predicted
from pruning.recovery.teacher import read_predictions, write_predictions
from pruning.report.card import Recovery
from pruning.report.recovery import NAME, RecoveryReport
from pruning.runs.places import check_batch, say_places, working
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


def recover(
    folder: str | os.PathLike,
    *,
    steps: Steps | None = None,
    where: PlaceOptions | None = None,
    **options: Any,
) -> RecoveryReport:
    """Train a pruned model on text and export it.

    The dense model runs once, before the student is read; the two are never in memory together.
    An interrupted run is repeated with the same options and goes on where it stood; of a finished
    one the report is read again.

    Args:
      folder: output folder of `compress` or `apply`, or one of its exports.
      steps: where progress goes; default stderr, of process 0.
      where: devices and processes that share the windows of every batch, with the same result but
        for rounding and the load-balance loss, which is of a device's windows; default one device,
        and the processes of `jax.distributed` if that is initialized. All see the folders under
        the same paths; process 0 exports.
      options: fields of `RecoverOptions`; `text` and `output` at least.

    Returns:
      The report, which is also in the output folder, beside exports/.

    Raises:
      InputError: bad input, before any expensive work, or another command writes there.
      FullDiskError: the disk is full; what is finished stays.
      LostProcess: another process has ended; what is finished stays.
      VerificationError: an export differs from the model in memory.
    """
    asked = RecoverOptions(**options)
    with working(asked.output, where, steps) as (spread, steps):
        return _recover(Path(folder), asked.filled(), steps, spread)


def _recover(folder: Path, options: RecoverOptions, steps: Steps, spread: Spread) -> RecoveryReport:
    with steps.bar("open"):
        run = open_recovery(folder, options, steps)
    place = RecoverFolder(folder, run, spread)
    spread.require_same({
        "command": place.identity, "mesh": [spread.devices, spread.parts],
        "overwrite": options.overwrite,
    })  # fmt: skip
    check_batch(options.batch, options.mode, run.student.base.config.moe.num_experts, spread)
    if spread.led(place.is_finished):
        report = RecoveryReport.load(run.output / NAME)
        steps.say(f"this run is finished since {report.environment['date']}; --overwrite repeats")
        place.clear_working_files()  # of a run killed in its last moment
        return report
    say_places(spread, steps, options.batch)
    check_recovery(run, steps, spread, place.is_predicted)
    place.remove_predictions(spread.led(place.prepare))
    spread.everyone(True)  # before new ones are written
    with spread.naming_lost():
        _train(run, place, steps)
    report = spread.led_and_read(
        lambda: _exported(run, place, steps), lambda: RecoveryReport.load(run.output / NAME)
    )
    # Before what the same command needs to write and verify them again is gone.
    require_verified([Check(**check) for check in report.verification])
    place.clear_working_files()
    return report


def _exported(run: RecoverJob, place: RecoverFolder, steps: Steps) -> RecoveryReport:
    """Write what was trained, verify and measure it."""
    deltas = load_deltas(place.deltas, run.student.source, run.deltas)
    training = place.training()
    model = recovered_source(run.student.source, deltas, run.deltas)
    if run.options.adapter:
        write_adapter(run.student, deltas, run.deltas, run.output / ADAPTER)
    rows = run.card_rows(training)
    checks = [check for name in run.forms for check in _verified(run, name, deltas, rows, steps)]
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
    return report


def _verified(
    run: RecoverJob, name: str, deltas: Deltas, rows: Recovery, steps: Steps
) -> list[Check]:
    """Checks of an export, written if it lacks, and once more if an older one is wrong."""
    student, form, target = run.student, run.forms[name], run.output / "exports" / name
    stored = recovered_source(student.source, deltas, run.deltas, form)
    for was_there in (True, False) if target.exists() else (False,):
        if not was_there:
            shutil.rmtree(target, ignore_errors=True)
            write_recovered(student, stored, form, target, rows, steps)
        with steps.bar(f"verify {name}"):
            checks = verify_export(
                student.base, student.plan, form, target, random_probe(student.base), model=stored
            )
        if all(check.ok for check in checks):
            break
    return checks


def _train(run: RecoverJob, place: RecoverFolder, steps: Steps) -> None:
    """Train, unless that is done already."""
    spread = place.spread
    if spread.led(place.deltas.is_file):
        return
    text, held = spread.awaited(lambda: _texts(run, place, steps))
    with steps.bar("train") as on_step, place.session(on_step) as on_step:
        course = Course(text, held, run.deltas, run.how, place.checkpoints, on_step, spread)
        deltas = _fitted(run, course, place)
    spread.led(lambda: _finish(run, place, course, deltas))


def _fitted(run: RecoverJob, course: Course, place: RecoverFolder) -> Deltas:
    """Train the student, in memory end to end or one layer after the other."""
    student = run.student.source
    if run.options.mode == "layer":
        return fit_layers(run.student.base, student, course, on_layer=place.log_layer)
    rate = course.schedule.schedule()

    def log(step: int, means: dict[str, float]) -> None:
        place.log(step, means | {"learning_rate": np.asarray(rate(step - 1)).item()})

    return fit(student, course, on_log=log, on_held_out=place.log_held_out)


def _finish(run: RecoverJob, place: RecoverFolder, course: Course, deltas: Deltas) -> None:
    """Remember what was trained."""
    planned = course.schedule.steps
    done = max((row["step"] for row in place.history() if "step" in row), default=planned)
    place.finish_training({
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(deltas)),
        "steps": done,
        "tokens_seen": run.text.total * run.how.epochs * done // planned,
    })  # fmt: skip
    save_deltas(place.deltas, deltas)


def _texts(
    run: RecoverJob, place: RecoverFolder, steps: Steps
) -> tuple[TrainingText, TrainingText]:
    """This process's windows to train and to measure on, with the dense model's predictions of
    them, made if they lack."""
    spread = place.spread
    both = (run.text, own_part(spread, run.how.batch, len(run.text.tokens))), (
        run.held, spread.in_a_row(len(run.held.tokens))
    )  # fmt: skip
    predictions = None
    if run.learns_predictions:
        file = place.predictions
        if not file.is_file():
            tokens, valid = (
                np.concatenate([getattr(one, n)[own.start : own.stop] for one, own in both])
                for n in ("tokens", "valid")
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            with steps.bar("predictions of the dense model") as on_step:
                write_predictions(
                    file, run.student.base, tokens, valid, run.options.top,
                    batch=run.options.batch, dtype=run.how.dtype, on_layer=on_step,
                )  # fmt: skip
        predictions = read_predictions(file)
    found, before = [], 0
    for one, own in both:
        by_layer = run.options.mode == "layer"  # where nothing is predicted
        wanted = one.valid if by_layer else predicted(one.valid, one.counted)
        part = slice(own.start, own.stop)
        found.append(TrainingText(
            one.tokens[part], one.valid[part], wanted[part],
            None if predictions is None else predictions[before : before + len(own)],
            own.start, wanted.sum(1),
        ))  # fmt: skip
        before += len(own)
    return found[0], found[1]


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
