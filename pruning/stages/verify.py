"""Re-reading an exported folder and comparing it with what was meant to be written."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.description import Description
from convert.export import Export
from convert.export_format import ExportFormat
from convert.mtp import mtp_prefixes
from convert.mtp_export import MtpSource
from convert.reader import CheckpointError
from moe_jax.errors import InputError
from moe_jax.quantized import widened_layer
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource, mapped
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import allowance
from pruning.measure.settled import settled_logits
from pruning.shrink.gptq_model import codes_in
from pruning.shrink.rounding import bfloat16_experts
from pruning.stages.checks import Check, logit_check, long_check
from pruning.stages.client import Answer, client_answer
from pruning.stages.content import (
    TensorComparison,
    config_problems,
    file_problems,
    in_words,
    not_copied,
)
from pruning.stages.export import mtp_source, pruned_source
from pruning.stages.made_by import repair_hash
from pruning.stages.probe_windows import PROBE_TOKENS, Probe, ProbeWindows
from pruning.stages.sizes import export_of
from pruning.stages.tokenizer_check import tokenizer_result

TENSORS, MTP_TENSORS = "tensors", "layers that predict further tokens"
CODES = "4-bit codes"
IN_JAX, IN_TRANSFORMERS = "logits in JAX", "logits in transformers"
APART, LONG = " at positions far apart", " at the ends of long windows"

# Of each of the windows float32 [B, P, V] and bool [B, P], as of `settled_logits`.
Logits = list[tuple[np.ndarray, np.ndarray]]


def verify_export(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    target: Path,
    probe: Probe,
    codes: Path | None = None,
    repair: Path | None = None,
    model: LayerSource | None = None,
    spread: Spread = ALONE,
) -> list[Check]:
    """Compare one export with what base, plan and quantiser give, and with what it computes.

    Every file and every bit of every tensor is compared, a layer at a time, and nothing in the
    folder is run before. Logits then say that programs find the same model in it.

    Processes take turns with layers; process 0 compares the files and asks other programs.

    Args:
      base: the dense model.
      plan: what is kept.
      form: the format.
      target: the folder.
      probe: windows to compare logits on.
      codes: folder of the 4-bit codes, None if weights are rounded to nearest.
      repair: folder of the repaired weights, None if none were.
      model: what was written, rounded as the format has it, if weights were changed; default what
        base and plan give.
      spread: the processes.

    Returns:
      The checks, in order and in every process; what cannot be done after a failure, or for want
      of memory, says so.
    """
    export = export_of(base.about, plan, form)
    problems = spread.led(lambda: file_problems(target, export))
    fine = "code, config.json, tokenizer and all else that programs read: as planned"
    fine += not_copied(base.about.folder)
    checks = [Check(form.name, "files", not problems, in_words(problems) or fine)]
    if tokenizer := spread.led(lambda: tokenizer_result(target, export, trusted=not problems)):
        checks.append(Check(form.name, "tokenizer", *tokenizer))
    if not form.is_int4:
        codes = None  # GPTQ has none for it
    made_of = {"plan": plan.content_hash, "repair": None if repair is None else repair_hash(repair)}
    lost = "" if codes is None else spread.led(partial(codes_in(codes).fault, **made_of))
    expected = model or pruned_source(base, plan, form, None if lost else codes, repair=repair)
    try:
        comparison = TensorComparison(target, export, with_codes=not lost)
    except CheckpointError as error:
        return [*checks, Check(form.name, TENSORS, False, str(error))]
    wanted = _compare(comparison, export, mtp_source(base), expected, probe, spread)
    checks += _tensor_checks(comparison, export)
    if problems:
        why = "its files are not those that were written, and nobody else's code is run"
        return [*checks, *(_undone(form, name, why) for name in (IN_JAX, IN_TRANSFORMERS))]
    return checks + _logit_checks(target, export, probe, wanted, lost, spread)


def _logit_checks(
    target: Path, export: Export, probe: Probe, wanted: Logits, lost: str, spread: Spread
) -> list[Check]:
    """Whether programs compute what is wanted from a folder whose files are right; `lost` says why
    that is not known of its 4-bit codes."""
    form = export.form
    # What sliding windows of attention do is asked of another program alone.
    near = [number for number, some in enumerate(probe) if lost or not some.is_long]
    try:
        found = _stored_logits(target, [probe[number] for number in near], spread)
    except InputError as error:
        why = "JAX does not read the folder"
        return [Check(form.name, IN_JAX, False, str(error)), _undone(form, IN_TRANSFORMERS, why)]
    if lost:
        why = f"{lost}; `moe-compress export --overwrite` chooses them again"
        checks = [_undone(form, name, why) for name in (CODES, IN_JAX)]
        wanted = found
    else:
        checks = [
            logit_check(form.name, IN_JAX + _where(probe[number]), logits, *wanted[number])
            for number, (logits, _) in zip(near, found, strict=True)
        ]
    answers: list[Answer] = []  # of process 0 alone

    def ask() -> bool:
        answers.append(client_answer(target, export, probe))
        return answers[0].logits is not None and _narrows_experts(form)

    if spread.led(ask):
        wanted = _stored_logits(target, probe, spread, bfloat16_experts)

    def told() -> list[dict[str, Any]]:
        return list(map(dataclasses.asdict, _client_checks(export, answers[0], probe, wanted)))

    return checks + [Check(**one) for one in spread.led(told)]


def _compare(
    comparison: TensorComparison,
    export: Export,
    mtp: MtpSource,
    expected: LayerSource,
    probe: Probe,
    spread: Spread,
) -> Logits:
    """Compare all tensors; the logits of the model that they come from. Each layer is made once, or
    each group of its experts, in one process."""

    def compare(index: int, layer: DecoderLayer) -> DecoderLayer:
        comparison.add(export.layer_arrays(layer, index))
        return widened_layer(layer)  # as the folder is read: compiled once for both

    if spread.leads:
        comparison.add(export.outer_arrays(expected))
        comparison.add(export.mtp_arrays(mtp))
    logits = _logits(mapped(expected, compare, export.by_group), probe, spread)
    comparison.share(spread)
    return logits


def _tensor_checks(comparison: TensorComparison, export: Export) -> list[Check]:
    drafting = frozenset(map(export.stored_name, export.mtp_specs))
    checks = []
    for check, names in ((TENSORS, comparison.names - drafting), (MTP_TENSORS, drafting)):
        if names:
            problems = comparison.problems_of(names)
            detail = in_words(problems) or comparison.words(names)
            checks.append(Check(export.form.name, check, not problems, detail))
    return checks


def _stored_logits(
    folder: Path,
    probe: Sequence[ProbeWindows],
    spread: Spread,
    change: Callable[[LayerSource], LayerSource] = lambda s: s,
) -> Logits:
    """Logits of a folder as we read it."""
    export = open_checkpoint(folder, dtype=jnp.float32)
    export.read_ahead, export.experts_at_once = allowance().reading
    return _logits(change(export), probe, spread)


def _logits(source: LayerSource, probe: Sequence[ProbeWindows], spread: Spread) -> Logits:
    tokens, strides = [some.tokens for some in probe], [some.stride for some in probe]
    return settled_logits(source, tokens, PROBE_TOKENS, strides=strides, spread=spread)


def _where(windows: ProbeWindows) -> str:
    """What the name of a check adds for these windows."""
    return LONG if windows.is_long else APART if windows.stride > 1 else ""


def _undone(form: ExportFormat, check: str, why: str) -> Check:
    return Check(form.name, check, True, f"not done: {why}", done=False)


def _narrows_experts(form: ExportFormat) -> bool:
    """Whether transformers dequantises the experts of a format to bfloat16: 5 does, 4 did not."""
    fuses = int(version("transformers").partition(".")[0]) >= 5
    return fuses and form.is_integer and form.is_padded


def _client_checks(export: Export, answer: Answer, probe: Probe, wanted: Logits) -> list[Check]:
    form, loads = export.form, "transformers loads every tensor"
    if answer.undone and answer.logits is None:
        return [_undone(form, IN_TRANSFORMERS, answer.undone)]
    if answer.logits is None or answer.loading is None:
        return [Check(form.name, loads, False, answer.fault)]
    # It ignores layers that predict further tokens, and reports those of unpublished sizes.
    prefixes = mtp_prefixes(export.base.family, export.base.hf_config)
    mtp = tuple(map(export.stored_name, prefixes))
    known = {k: [v for v in value if not v.startswith(mtp)] for k, value in answer.loading.items()}
    missing = known.get("missing_keys", [])
    absent = _other_parts(missing) if export.base.outer and not export.base.beside else set()
    known["missing_keys"] = [name for name in missing if name not in absent]
    problems = {key: value[:3] for key, value in known.items() if value}
    detail = str(problems) if problems else "none missing, unexpected or mismatched"
    detail += f", but for {len(absent)} of other parts, of which the model has none" * bool(absent)
    checks = [Check(form.name, loads, not problems, detail)]
    for number, some in enumerate(probe):
        name = IN_TRANSFORMERS + _where(some)
        if number >= len(answer.logits):
            checks.append(_undone(form, name, answer.undone))
        elif some.is_long:
            checks.append(long_check(form.name, name, answer.logits[number], wanted[number][0]))
        else:
            checks.append(logit_check(form.name, name, answer.logits[number], *wanted[number]))
    return checks


def _other_parts(names: list[str]) -> set[str]:
    """Those that classes of transformers have outside of a wrapper's text model."""
    own = ("language_model", "lm_head")
    return {name for name in names if not any(part in own for part in name.split("."))}


def written_form(
    folder: Path, base: Description, plan: PruningPlan, form: ExportFormat
) -> ExportFormat:
    """A format, with what an export did to layers that predict further tokens.

    `export` may have been told otherwise than the recipe: what config.json says decides, if it is
    one that an export writes.
    """
    for mtp in (form.mtp, "drop", "keep", "prune"):
        one = dataclasses.replace(form, mtp=mtp)
        if not config_problems(folder, export_of(base, plan, one)):
            return one
    return form
