"""Re-reading an exported folder and comparing it with what was meant to be written."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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
from moe_jax.stream import LayerSource, mapped
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.kit.errors import VerificationError
from pruning.measure.settled import settled_logits
from pruning.shrink.gptq_model import codes_in
from pruning.shrink.rounding import bfloat16_experts
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
from pruning.stages.probe_windows import PROBE_TOKENS, Probe
from pruning.stages.sizes import export_of
from pruning.stages.tokenizer_check import tokenizer_result

TOLERANCE = 2e-3  # of float32 logits of two programs, as a share of the largest (at least 1)
LEAST, SHARE = 8, 0.01  # positions to judge by; without so many, how many of all may differ
MOST = 0.75  # of the positions at the ends of long windows, near ties or not
TENSORS, MTP_TENSORS = "tensors", "layers that predict further tokens"
CODES = "4-bit codes"
IN_JAX, IN_TRANSFORMERS = "logits in JAX", "logits in transformers"
FAR = "logits in transformers at the ends of long windows"

# Of each of the windows float32 [B, P, V] and bool [B, P], as of `settled_logits`.
Logits = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Check:
    """One verified fact about an export, or one that could not be verified.

    Attributes:
      export: format of the folder.
      check: what was compared.
      ok: False if something is wrong.
      detail: what was compared and how it came out, or why nothing was.
      done: False if nothing was compared; then `ok` says no more than that nothing is known.
    """

    export: str
    check: str
    ok: bool
    detail: str
    done: bool = True


def require_verified(checks: Sequence[Check]) -> None:
    """Raise VerificationError naming every check that failed."""
    failed = [f"{c.export}: {c.check}: {c.detail}" for c in checks if not c.ok]
    if failed:
        raise VerificationError(
            f"{'; '.join(failed)}. Do not use the folder: export it again with --overwrite, and if "
            "that changes nothing, tell us the lines above"
        )


def verify_export(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    target: Path,
    probe: Probe,
    codes: Path | None = None,
    repair: Path | None = None,
    model: LayerSource | None = None,
) -> list[Check]:
    """Compare one export with what base, plan and quantiser give, and with what it computes.

    Every file and every bit of every tensor is compared, a layer at a time, and nothing in the
    folder is run before. Logits then say that programs find the same model in it.

    Args:
      base: the dense model.
      plan: what is kept.
      form: the format.
      target: the folder.
      probe: windows to compare logits on, each int32 [B, T].
      codes: folder of the 4-bit codes, None if weights are rounded to nearest.
      repair: folder of the repaired weights, None if none were.
      model: what was written, rounded as the format has it, if weights were changed; default what
        base and plan give.

    Returns:
      The checks, in order; what cannot be done after a failure, or for want of memory, says so.
    """
    export = export_of(base.about, plan, form)
    problems = file_problems(target, export)
    fine = "code, config.json, tokenizer and all else that programs read: as planned"
    fine += not_copied(base.about.folder)
    checks = [Check(form.name, "files", not problems, in_words(problems) or fine)]
    if tokenizer := tokenizer_result(target, export, trusted=not problems):
        checks.append(Check(form.name, "tokenizer", *tokenizer))
    if not form.is_integer:
        codes = None  # GPTQ has none for it
    made_of = {"plan": plan.content_hash, "repair": None if repair is None else repair_hash(repair)}
    lost = "" if codes is None else codes_in(codes).fault(**made_of)
    expected = model or pruned_source(base, plan, form, None if lost else codes, repair=repair)
    try:
        comparison = TensorComparison(target, export, with_codes=not lost)
    except CheckpointError as error:
        return [*checks, Check(form.name, TENSORS, False, str(error))]
    wanted = _compare(comparison, export, mtp_source(base), expected, probe)
    checks += _tensor_checks(comparison, export)
    if problems:
        why = "its files are not those that were written, and nobody else's code is run"
        return [*checks, *(_undone(form, name, why) for name in (IN_JAX, IN_TRANSFORMERS))]
    return checks + _logit_checks(target, export, probe, wanted, lost)


def _logit_checks(
    target: Path, export: Export, probe: Probe, wanted: Logits, lost: str
) -> list[Check]:
    """Whether programs compute what is wanted from a folder whose files are right; `lost` says why
    that is not known of its 4-bit codes."""
    form = export.form
    try:
        found = _stored_logits(target, probe)
    except InputError as error:
        why = "JAX does not read the folder"
        return [Check(form.name, IN_JAX, False, str(error)), _undone(form, IN_TRANSFORMERS, why)]
    if lost:
        why = f"{lost}; `moe-compress export --overwrite` chooses them again"
        checks = [_undone(form, name, why) for name in (CODES, IN_JAX)]
        wanted = found
    else:
        checks = [logit_check(form.name, IN_JAX, found[0][0], *wanted[0])]
    answer = client_answer(target, export, probe)
    if answer.logits is not None and _narrows_experts(form):
        wanted = _stored_logits(target, probe, bfloat16_experts)
    return checks + _client_checks(export, answer, wanted)


def _compare(
    comparison: TensorComparison,
    export: Export,
    mtp: MtpSource,
    expected: LayerSource,
    probe: Probe,
) -> Logits:
    """Compare all tensors; the logits of the model that they come from. Each layer is made once."""

    def compare(index: int, layer: DecoderLayer) -> DecoderLayer:
        comparison.add(export.layer_arrays(layer, index))
        return widened_layer(layer)  # as the folder is read: compiled once for both

    comparison.add(export.outer_arrays(expected))
    comparison.add(export.mtp_arrays(mtp))
    return settled_logits(mapped(expected, compare), probe, PROBE_TOKENS)


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
    folder: Path, probe: Probe, change: Callable[[LayerSource], LayerSource] = lambda s: s
) -> Logits:
    """Logits of a folder as we read it."""
    return settled_logits(change(open_checkpoint(folder, dtype=jnp.float32)), probe, PROBE_TOKENS)


def _undone(form: ExportFormat, check: str, why: str) -> Check:
    return Check(form.name, check, True, f"not done: {why}", done=False)


def _narrows_experts(form: ExportFormat) -> bool:
    """Whether transformers dequantises the experts of a format to bfloat16: 5 does, 4 did not."""
    fuses = int(version("transformers").partition(".")[0]) >= 5
    return fuses and form.is_integer and form.is_padded


def _client_checks(export: Export, answer: Answer, wanted: Logits) -> list[Check]:
    form, loads = export.form, "transformers loads every tensor"
    if answer.undone:
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
    checks.append(logit_check(form.name, IN_TRANSFORMERS, answer.logits[0], *wanted[0]))
    for found, (logits, _) in zip(answer.logits[1:], wanted[1:], strict=True):
        checks.append(far_check(form.name, found, logits))
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


def logit_check(
    export: str, name: str, found: np.ndarray, wanted: np.ndarray, settled: np.ndarray
) -> Check:
    """Compare logits [B, P, V] of a program with those wanted, where they must be the same.

    Args:
      export, name: of the check.
      found, wanted: float32 [B, P, V].
      settled: bool [B, P], where rounding cannot have sent a token to another expert. If found and
        wanted differ anywhere, these positions are judged. Are they fewer than `LEAST` or first
        ones alone, which see no other position, a hundredth of all may differ.
    """
    difference, limit = _difference(found, wanted)
    within = difference <= limit  # False for NaN
    enough = settled.sum() >= LEAST and settled[:, 1:].any()
    judged = settled if enough and not within.all() else np.ones_like(settled)
    ok = within[judged].all() if enough else within.mean() >= 1 - SHARE
    detail = f"max difference {difference[judged].max():.2g} (limit {limit:.2g})"
    if not judged.all():
        detail += f" at {judged.sum()} of {judged.size} positions; others follow a near tie"
    elif not within.all():
        detail += f"; {within.size - within.sum()} of {within.size} positions differ by more"
    return Check(export, name, bool(np.isfinite(found).all() and ok), detail)


def far_check(export: str, found: np.ndarray, wanted: np.ndarray) -> Check:
    """Compare logits at the ends of long windows, where sliding windows and stretched ropes show.

    Hardly one has no near tie before it. What that changes of one token is little among so many,
    but a mask or an angle that is wrong is wrong at all positions: most must be the same.

    Args:
      export: its name.
      found, wanted: float32 [B, P, V].
    """
    difference, limit = _difference(found, wanted)
    within = difference <= limit
    detail = f"{within.sum()} of {within.size} positions differ by no more than {limit:.2g}"
    return Check(export, FAR, bool(within.mean() >= MOST), detail)


def _difference(found: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """Largest difference of each position, [B, P], and the largest that rounding explains."""
    limit = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    return np.abs(found - wanted).max(axis=-1), limit
