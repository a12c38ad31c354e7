"""What a compression would give and cost, before any of it is done."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.clients import client_table
from convert.description import Description, describe
from convert.export_format import MIXED, ExportFormat, Widths
from convert.rules import EMBEDDING, LM_HEAD, ruled_tensors
from convert.writer import SPARE_BYTES
from moe_jax.errors import InputError
from pruning.demo import model_folder
from pruning.kit.memory import Allowance, allowing, free_memory
from pruning.recipe.options import BUDGETS
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.recipe.recover_options import DEFAULT_TOKENS, RecoverOptions
from pruning.recipe.values import check_whole
from pruning.runs.cap import recipe_allowance
from pruning.runs.memory import memory
from pruning.runs.probe import (
    choosing_seconds,
    forward_seconds,
    kept_out_tokens,
    scoring_seconds,
)
from pruning.runs.recovery_costs import recovery_costs, recovery_seconds
from pruning.stages.job import require_possible, resolved
from pruning.stages.preflight import (
    SCRATCH,
    free_space,
    is_elsewhere,
    rehearsed_plan,
    written_bytes,
)
from pruning.stages.size_bounds import byte_range, keeps_even_experts
from pruning.stages.sizes import dense_bytes, export_of, foreseen_form, form_of

PROBED_BYTES = 6  # of each weight of the layer that is timed, with what is made of it
TIMES = ("scoring_seconds", "choosing_seconds", "recovery_seconds")


def open_described(folder: Path) -> Checkpoint | Description:
    """A checkpoint with its headers checked; where no weights lie, what config.json says.

    Raises:
      InputError: the config or a header is wrong.
    """
    has_weights = any(path.is_file() for path in folder.glob("*.safetensors"))
    return open_checkpoint(folder) if has_weights else describe(folder)


def estimate(
    recipe: CompressionRecipe,
    rates: Sequence[float] = (),
    *,
    tensor_parallel: int = 1,
    probe: bool | None = None,
    recovery_tokens: int | str = DEFAULT_TOKENS,
) -> list[dict[str, Any]]:
    """Sizes, costs and clients of a recipe at each prune rate, or at its own budget.

    Nothing is written; of its output folder, the free space of the disk is looked at.

    Args:
      recipe: what would be done; config.json suffices as its model.
      rates: prune rates instead of the recipe's budget.
      tensor_parallel: GPUs that will share each layer, at least 1.
      probe: time a layer to foretell the seconds of scoring, of measuring rules and of a recovery;
        default if the weights are there.
      recovery_tokens: of text that `recover` would train on.

    Returns:
      One entry per rate, of JSON-compatible values; sizes are bytes.

    Raises:
      InputError: the recipe is impossible, or its memory limit too little, in the words of
        `compress`.
    """
    check_whole("tensor_parallel", tensor_parallel, 1)
    asked: dict[str, Any] = {"text": ("-",), "output": "-", "tokens": recovery_tokens}
    tokens = RecoverOptions(**asked).filled().tokens
    assert tokens is not None
    base = open_described(model_folder(recipe.model, weights=False))
    budgets = [{**dict.fromkeys(BUDGETS), "prune_rate": rate} for rate in rates]
    recipes = [dataclasses.replace(recipe, **budget) for budget in budgets]
    about = base.about if isinstance(base, Checkpoint) else base
    found = [_estimate(about, one, tensor_parallel, tokens) for one in recipes or [recipe]]
    seconds: dict[str, float | None] = dict.fromkeys(TIMES)
    if isinstance(base, Checkpoint) if probe is None else probe:
        if not isinstance(base, Checkpoint):
            raise InputError(f"{about.folder} has no weights to probe; leave out --probe")
        # The time is the same at every rate.
        whole = resolved(recipe, about)
        base.experts_at_once = _probed_experts(about, whole)
        training = recovery_seconds(forward_seconds(base, whole), tokens)
        times = (
            round(scoring_seconds(base, whole), 1),
            round(choosing_seconds(base, whole), 3),
            round(training, 1),
        )
        seconds = dict(zip(TIMES, times, strict=True))
    return [{**one, **seconds} for one in found]


def _probed_experts(base: Description, recipe: ResolvedRecipe) -> int | None:
    """Experts of the layer that is timed, fewer than all if that takes more than there is."""
    moe, limit = base.config.moe, recipe.memory_limit
    with allowing(Allowance(limit=limit)):
        free = free_memory()
    needed = PROBED_BYTES * 3 * moe.num_experts * moe.d_expert * base.config.d_model
    return None if needed <= free else max(1, moe.num_experts * free // needed)


def _estimate(
    base: Description, recipe: CompressionRecipe, tensor_parallel: int, recovery_tokens: int
) -> dict[str, Any]:
    """One entry of `estimate`, all but the time.

    The formats are those the recipe names, of one plan, as `compress` would write them; else all
    that the family, the bits and `mtp` allow, each planned as if it were the only one. A target in
    bytes is one of a single format, so it leaves the one that `compress` would choose.
    """
    whole = resolved(recipe, base)
    require_possible(whole, base)
    if recipe.export or whole.target_bytes is not None:
        jobs = dict.fromkeys(whole.export, whole)
    else:
        native = base.native is not None and base.native.floating
        shown = {recipe.bits, 16, *((8,) if native and recipe.bits == 4 else ())}
        jobs = {
            name: resolved(dataclasses.replace(recipe, export=(name,), bits=bits), base)
            for name in base.family.formats
            if name != MIXED and (bits := ExportFormat(name).bits) in shown
        }
        jobs = {name: one for name, one in jobs.items() if _holds(base, one, name)}
    windows = 0 if whole.weights_only else math.ceil(whole.max_tokens / whole.window)
    within = recipe_allowance(base, whole)
    with allowing(within):
        parts = written_bytes(base, whole, windows)
    apart = {}  # on another disk
    if SCRATCH in parts and is_elsewhere(whole):
        free = free_space(whole.scratch_folder)
        apart = {"needed_bytes": parts.pop(SCRATCH) + SPARE_BYTES, "free_bytes": free}
    dense = parameters(base, base.widths, base.mtp_weights)
    return {
        "prune_rate": whole.prune_rate,
        "removed": 1.0 - float(rehearsed_plan(whole, base).keep.mean()),
        "dense_bytes": dense_bytes(base),
        "parameters": dense,
        "exports": {name: _export(base, one, name, tensor_parallel) for name, one in jobs.items()},
        "memory_limit": whole.memory_limit,
        "memory": memory(base, whole, within),
        "disk": {
            "needed_bytes": sum(parts.values()) + SPARE_BYTES,
            "free_bytes": free_space(Path(whole.output)),
            "parts": parts,
            **({"scratch": apart} if apart else {}),
        },
        "tokens": 0 if whole.weights_only else whole.max_tokens,
        "kept_out_tokens": kept_out_tokens(whole),
        "recovery": recovery_costs(base, whole, recovery_tokens),
        "tensor_parallel": tensor_parallel,
    }


def _holds(base: Description, recipe: ResolvedRecipe, name: str) -> bool:
    """Whether a format has a place for constants, for layers that are kept as they are, and for as
    many experts as are left of each layer."""
    form, moe = form_of(recipe, name), base.config.moe
    if form.constants and not form.holds_constants(moe.expert_bias):
        return False
    if form.renumbers and not keeps_even_experts(recipe):
        return False
    if form.mtp != "keep" or not form.is_padded:
        return True
    widths = export_of(base, rehearsed_plan(recipe, base), form).widths
    return form.padded_width(widths) == moe.d_expert


def _export(
    base: Description, recipe: ResolvedRecipe, name: str, tensor_parallel: int
) -> dict[str, Any]:
    plan, form = rehearsed_plan(recipe, base), foreseen_form(recipe, name, base)
    export = export_of(base, plan, form)
    export.check()
    fewest, most = byte_range(base, recipe, name, int(plan.counts.sum()))
    table = client_table(export, tensor_parallel)
    return {
        "bytes": export.nbytes,
        "fewest_bytes": fewest,
        "most_bytes": most,
        "group_size": form.step if form.is_packed else None,
        "width": form.padded_width(export.widths) if form.is_padded else None,
        "parameters": parameters(base, export.widths, export.mtp_parameters),
        "clients": {client: dataclasses.asdict(found) for client, found in table.items()},
    }


def parameters(base: Description, widths: Widths, mtp: int) -> dict[str, int]:
    """Weights by where they sit, at these expert widths; `active` is those that a token meets.

    A token meets as many experts per layer as the router picks, of average width, and the
    embedding only in one row, which is not counted. The `mtp` weights of layers that predict
    further tokens are met by drafts alone.
    """
    places = ("routed", "shared", "attention", "embeddings", "other")
    found: dict[str, int] = dict.fromkeys(places, 0)
    for name, shape, rule in ruled_tensors(base.family, base.config, widths):
        found[_place(name, rule.ours if rule else "")] += math.prod(shape)
    moe, main = base.config.moe, sum(found.values())
    picked = found["routed"] * moe.experts_per_token // moe.num_experts
    rows = base.config.vocab_size * base.config.d_model
    looked_up = 0 if base.config.tie_embeddings else rows
    active = main - found["routed"] + picked - looked_up
    return {"total": main + mtp, **found, "mtp": mtp, "active": active}


def _place(name: str, ours: str) -> str:
    if name in (EMBEDDING, LM_HEAD):
        return "embeddings"
    places = (("mlp.experts.", "routed"), ("mlp.shared.", "shared"), ("attention.", "attention"))
    return next((place for prefix, place in places if ours.startswith(prefix)), "other")
