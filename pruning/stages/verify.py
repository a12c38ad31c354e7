"""Re-reading an exported folder and comparing it with what was meant to be written."""

import dataclasses
import logging
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
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
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
from pruning.stages.sizes import export_of
from pruning.stages.tokenizer_check import tokenizer_result

logger = logging.getLogger(__name__)

TOLERANCE = 2e-3  # of float32 logits of two programs, as a share of the largest (at least 1)
LEAST, SHARE = 8, 0.01  # positions to judge by; without so many, how many of all may differ
# Many and short: a near tie ends what can be compared of its window.
PROBE_WINDOWS, PROBE_TOKENS = 8, 32
# Of a window that must be long: tokens, and numbers of the logits of two (256 MiB each time).
LONGEST_PROBE, MOST_LOGITS = 1024, 1 << 26
TENSORS, MTP_TENSORS = "tensors", "layers that predict further tokens"
CODES = "4-bit codes"
IN_JAX, IN_TRANSFORMERS = "logits in JAX", "logits in transformers"

Logits = tuple[np.ndarray, np.ndarray]  # float32 [B, T, V]; bool [B, T], as of `settled_logits`


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


def probe_lengths(config: ModelConfig) -> tuple[int, int]:
    """Tokens of a window to compare logits on, and how many would show all that a model does.

    Those are more than a sliding window or the original context of a stretched rope, by
    `PROBE_TOKENS`, but never more than the model's context: past them logits can differ that were
    equal before.
    """
    rope = config.attention.rope
    turning = rope.original_max_position if rope.kind not in ("default", "linear") else None
    beyond = max(config.sliding_window or 0, turning or 0)
    needed = min(beyond + PROBE_TOKENS, config.max_position)
    most = max(PROBE_TOKENS, min(LONGEST_PROBE, MOST_LOGITS // (2 * config.vocab_size)))
    return min(needed, most), needed


def probe_shape(config: ModelConfig) -> tuple[int, int]:
    """Windows and their tokens of a probe without a text, which is as long as any."""
    length, _ = probe_lengths(config)
    return max(2, PROBE_WINDOWS * PROBE_TOKENS // max(length, PROBE_TOKENS)), length


def random_probe(base: Checkpoint) -> np.ndarray:
    """Windows of random tokens, int32 [B, T], for comparing logits without a text."""
    length, needed = probe_lengths(base.config)
    if length < needed:
        logger.warning(
            "logits are compared on %d tokens, what the model does with more than %d is not",
            length,
            needed - PROBE_TOKENS,
        )
    tokens = np.random.default_rng(0).integers(0, base.config.vocab_size, probe_shape(base.config))
    # What stands for an image is no text, and programs compute another thing from it.
    outer = base.about.outer or {}
    others = {value for key, value in outer.items() if key.endswith("_token_id")}
    tokens[np.isin(tokens, [one for one in others if isinstance(one, int)])] = 0
    return tokens.astype(np.int32)


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
    probe: np.ndarray,
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
      probe: int32 [B, T] tokens to compare logits on.
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
    target: Path, export: Export, probe: np.ndarray, wanted: Logits, lost: str
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
        checks = [logit_check(form.name, IN_JAX, found[0], *wanted)]
    answer = client_answer(target, export, probe)
    if answer.logits is not None and _narrows_experts(form):
        wanted = _stored_logits(target, probe, bfloat16_experts)
    return checks + _client_checks(export, answer, wanted)


def _compare(
    comparison: TensorComparison,
    export: Export,
    mtp: MtpSource,
    expected: LayerSource,
    probe: np.ndarray,
) -> Logits:
    """Compare all tensors; the logits of the model that they come from. Each layer is made once."""

    def compare(index: int, layer: DecoderLayer) -> DecoderLayer:
        comparison.add(export.layer_arrays(layer, index))
        return layer

    comparison.add(export.outer_arrays(expected))
    comparison.add(export.mtp_arrays(mtp))
    return settled_logits(mapped(expected, compare), probe)


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
    folder: Path, probe: np.ndarray, change: Callable[[LayerSource], LayerSource] = lambda s: s
) -> Logits:
    """Logits of a folder as we read it."""
    return settled_logits(change(open_checkpoint(folder, dtype=jnp.float32)), probe)


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
    return [*checks, logit_check(form.name, IN_TRANSFORMERS, answer.logits, *wanted)]


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
    """Compare logits [B, T, V] of a program with those wanted, where they must be the same.

    Args:
      export, name: of the check.
      found, wanted: float32 [B, T, V].
      settled: bool [B, T], where rounding cannot have sent a token to another expert. If found and
        wanted differ anywhere, these positions are judged. Are they fewer than `LEAST` or first
        ones alone, which see no other position, a hundredth of all may differ.
    """
    difference = np.abs(found - wanted).max(axis=-1)
    limit = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
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
