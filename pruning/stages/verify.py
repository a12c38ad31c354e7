"""Re-reading an exported folder and comparing it with what was meant to be written."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.description import Description
from convert.export import Export
from convert.export_format import ExportFormat
from convert.formats.ragged import MTP
from convert.mtp import mtp_layers, mtp_prefixes
from convert.mtp_export import MtpSource
from convert.reader import SafetensorsFolder, read_json
from convert.rules import RAGGED
from moe_jax.config import ModelConfig
from moe_jax.quant import MIN_SCALE
from moe_jax.stream import LayerSource
from pruning.budget.plan import PruningPlan
from pruning.kit.errors import VerificationError
from pruning.measure.settled import settled_logits
from pruning.shrink.rounding import bfloat16_experts
from pruning.stages.export import mtp_source, pruned_source
from pruning.stages.sizes import export_of

logger = logging.getLogger(__name__)

TOLERANCE = 2e-3  # of float32 logits of two programs, as a share of the largest (at least 1)
LEAST, SHARE = 8, 0.01  # positions to judge by; without so many, how many of all may differ
# Many and short: a near tie ends what can be compared of its window.
PROBE_WINDOWS, PROBE_TOKENS = 8, 32
# Of a window that must be long: tokens, and numbers of the logits of two (256 MiB each time).
LONGEST_PROBE, MOST_LOGITS = 1024, 1 << 26
CLIENT_BYTES = 4 << 30  # larger folders are not loaded a second time through torch


@dataclass(frozen=True)
class Check:
    """One verified fact about an export."""

    export: str
    check: str
    ok: bool
    detail: str


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


def random_probe(base: Checkpoint) -> np.ndarray:
    """Windows of random tokens, int32 [B, T], for comparing logits without a text."""
    length, needed = probe_lengths(base.config)
    if length < needed:
        logger.warning(
            "logits are compared on %d tokens, what the model does with more than %d is not",
            length,
            needed - PROBE_TOKENS,
        )
    shape = (max(2, PROBE_WINDOWS * PROBE_TOKENS // max(length, PROBE_TOKENS)), length)
    tokens = np.random.default_rng(0).integers(0, base.config.vocab_size, shape)
    return tokens.astype(np.int32)


def require_verified(checks: Sequence[Check]) -> None:
    """Raise VerificationError naming every check that failed."""
    failed = [f"{c.export}: {c.check}: {c.detail}" for c in checks if not c.ok]
    if failed:
        raise VerificationError(
            f"{'; '.join(failed)}. Do not use the folder: export it again with --overwrite, and if "
            "that changes nothing, tell us the lines above"
        )


def verify_folder(
    folder: Path,
    *,
    export: Export,
    mtp: MtpSource,
    expected: LayerSource,
    probe: np.ndarray,
) -> list[Check]:
    """Compare a folder with the plan and with the model in memory.

    Args:
      folder: what was written.
      export: what it should hold.
      mtp: where layers that predict further tokens came from.
      expected: the pruned (and quantised) model whose function it must have.
      probe: int32 [B, T] tokens to compare logits on.

    Returns:
      The checks, in order; none is skipped after a failure that allows it.
    """
    form = export.form
    checks = [_tensor_check(folder, export)]
    if form.mtp != "drop":
        checks.append(_mtp_check(folder, export, mtp))
    wanted, settled = settled_logits(expected, probe)
    found, _ = settled_logits(open_checkpoint(folder, dtype=jnp.float32), probe)
    checks.append(logit_check(form.name, "logits in JAX", found, wanted, settled))
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if size <= CLIENT_BYTES:
            drafting = mtp_prefixes(export.base.family, export.base.hf_config)
            fuses = int(version("transformers").partition(".")[0]) >= 5  # experts, in bfloat16
            if fuses and form.is_packed and form.is_padded and not form.is_float4:
                wanted, settled = settled_logits(bfloat16_experts(expected), probe)
            loads = export.base.family.auto_class
            checks += _client_checks(folder, form, loads, drafting, probe, wanted, settled)
        else:
            logger.info("%s is too large to load again through transformers", folder)
    return checks


def _tensor_check(folder: Path, export: Export) -> Check:
    stored, expected = SafetensorsFolder(folder), export.specs
    wrong = sorted(set(expected) ^ set(stored.names))
    for name in set(expected) & set(stored.names):
        dtype, shape = stored.spec(name)
        if (np.dtype(dtype), tuple(shape)) != (expected[name][0], tuple(expected[name][1])):
            wrong.append(name)
        elif name.endswith("_scale") and not np.all(abs(stored.read(name)) >= MIN_SCALE):
            wrong.append(name)
    detail = f"{len(expected)} tensors as planned" if not wrong else f"wrong: {wrong[:5]}"
    return Check(export.form.name, "names, shapes, dtypes, scales", not wrong, detail)


def _mtp_check(folder: Path, export: Export, mtp: MtpSource) -> Check:
    """Whether layers that predict further tokens are what the base's become, bit for bit."""
    stored, form = SafetensorsFolder(folder), export.form
    wrong = [
        name
        for name, wanted in export.mtp_arrays(mtp)
        if name not in stored or stored.read(name).tobytes() != wanted.tobytes()
    ]
    how = "as in the base" if form.mtp == "keep" else "of the base, experts pruned"
    detail = f"wrong: {wrong[:5]}" if wrong else f"{len(export.base.mtp)} tensors {how}"
    return Check(form.name, "layers that predict further tokens", not wrong, detail)


def written_mtp(folder: Path, base: Description) -> str:
    """What an export says has become of the layers that predict further tokens.

    Raises:
      CheckpointError: config.json cannot be read.
    """
    hf, family = read_json(folder / "config.json"), base.family
    if not (base.mtp and mtp_layers(family, hf)):
        return "drop"
    own = base.config.moe.d_expert
    stored = own if hf["model_type"].startswith(RAGGED) else hf[family.width_key]
    return "keep" if hf.get(MTP, stored) == own else "prune"


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


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the bars and warnings of torch programs off stderr; what matters is in the checks."""
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        # compressed-tensors draws bars of its own, which have no switch.
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


def _client_checks(
    folder: Path,
    form: ExportFormat,
    auto_class: str,
    mtp: tuple[str, ...],
    probe: np.ndarray,
    wanted: np.ndarray,
    settled: np.ndarray,
) -> list[Check]:
    try:
        with _silence():
            info, found = _client_logits(folder, form, auto_class, probe)
    except ImportError as error:
        return [Check(form.name, "transformers", True, f"not checked: {error}")]
    # It ignores layers that predict further tokens, and reports those of unpublished sizes.
    known = {key: [v for v in value if not str(v).startswith(mtp)] for key, value in info.items()}
    problems = {key: value[:3] for key, value in known.items() if value}
    detail = str(problems) if problems else "none missing, unexpected or mismatched"
    checks = [Check(form.name, "transformers loads every tensor", not problems, detail)]
    name = "logits in transformers"
    return [*checks, logit_check(form.name, name, found, wanted, settled)]


def _client_logits(
    folder: Path, form: ExportFormat, auto_class: str, probe: np.ndarray
) -> tuple[dict, np.ndarray]:
    """What transformers reports while loading a folder, and the model's logits [B, T, V]."""
    import torch
    import transformers

    options: dict[str, Any] = {}
    if form.is_float4:  # its kernels would need a GPU; this way the values are exact
        from transformers.utils.quantization_config import Mxfp4Config

        options["quantization_config"] = Mxfp4Config(dequantize=True)
    loaded: Any = getattr(transformers, auto_class).from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=not form.is_padded,
        output_loading_info=True,
        **options,
    )
    model, info = loaded
    model = torch.nn.Module.float(model).eval()  # quantised models refuse their own .float
    with torch.no_grad():
        return info, model(torch.from_numpy(probe).long()).logits.float().numpy()


def verify_export(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    target: Path,
    probe: np.ndarray,
    codes: Path | None = None,
) -> list[Check]:
    """Check one export against its plan and the model in memory."""
    return verify_folder(
        target,
        export=export_of(base.about, plan, form),
        mtp=mtp_source(base),
        expected=pruned_source(base, plan, form, codes),
        probe=probe,
    )
