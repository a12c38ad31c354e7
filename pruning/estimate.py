"""What a compression would give and cost, before any of it is done."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.description import Description, describe
from convert.export import check_widths, export_bytes, packed_inputs
from convert.rules import EMBEDDING, LM_HEAD, Widths, expected_tensors, uniform_widths
from convert.writer import SPARE_BYTES
from pruning.clients import client_table
from pruning.preflight import free_space, rehearsed_plan, written_bytes
from pruning.probe import scoring_seconds
from pruning.recipe import CompressionRecipe
from pruning.sizes import form_of, kept_widths, most_bytes, statistics_bytes
from pruning.text_table import TextTable

PROCESS_BYTES = 400 << 20  # Python, jax and its compiler
LAYERS_HELD = 2.1  # the one at work and the one being read ahead, tests/test_convert_memory.py
CHUNK = 64  # windows that a sweep holds at once


def open_description(folder: Path) -> Description:
    """A checkpoint with its headers checked; where no weights lie, what config.json says.

    Raises:
      ValueError: the config or a header is wrong, the model has no experts or is pruned already.
    """
    has_weights = any(folder.glob("*.safetensors*"))
    base = open_checkpoint(folder) if has_weights else describe(folder)
    if not base.config.moe_layers:
        raise ValueError(f"{folder} has no layer with experts; there is nothing to prune")
    if base.widths != uniform_widths(base.config):
        raise ValueError(f"{folder} is already pruned; give the dense model that it came from")
    return base


def estimate(
    base: Description, recipe: CompressionRecipe, *, tensor_parallel: int = 1, probe: bool = False
) -> dict[str, Any]:
    """Sizes, costs and clients of a recipe's exports.

    Args:
      base: the dense model.
      recipe: what would be done; every format of its `export` is planned as if it were the only
        one, as `compress --export NAME` would.
      tensor_parallel: GPUs that will share each layer.
      probe: time a layer to foretell the seconds of scoring; needs weights.

    Returns:
      JSON-compatible values; sizes are bytes.

    Raises:
      ValueError: the recipe is impossible, in the words of `compress`.
    """
    exports = {}
    for name in recipe.export:
        bits = 4 if name.endswith("int4") else 16
        one = _resolved(base, dataclasses.replace(recipe, export=(name,), bits=bits))
        exports[name] = _export(base, one, name, tensor_parallel)
    bits = 4 if any(name.endswith("int4") for name in recipe.export) else 16
    whole = _resolved(base, dataclasses.replace(recipe, bits=bits))
    assert whole.window is not None
    parts = written_bytes(base, whole, math.ceil(whole.max_tokens / whole.window))
    disk = {
        "needed_bytes": sum(parts.values()) + SPARE_BYTES,
        "free_bytes": free_space(Path(recipe.output)),
        "parts": parts,
    }
    seconds = None
    if probe:
        if not isinstance(base, Checkpoint):
            raise ValueError(f"{base.folder} has no weights to probe; leave out --probe")
        seconds = round(scoring_seconds(base, whole), 1)
    return {
        "prune_rate": whole.prune_rate,
        "parameters": parameters(base, base.widths),
        "exports": exports,
        "memory": memory(base, whole),
        "disk": disk,
        "scoring_seconds": seconds,
        "tokens": whole.max_tokens,
        "tensor_parallel": tensor_parallel,
    }


def _resolved(base: Description, recipe: CompressionRecipe) -> CompressionRecipe:
    c = base.config
    return recipe.resolved(c.moe.d_expert, c.d_model, c.max_position, packed_inputs(base))


def _export(
    base: Description, recipe: CompressionRecipe, name: str, tensor_parallel: int
) -> dict[str, Any]:
    plan, form = rehearsed_plan(recipe, base), form_of(recipe, name)
    widths = kept_widths(plan, base)
    check_widths(base, widths, form)
    table = client_table(base, widths, form, tensor_parallel)
    return {
        "bytes": export_bytes(base, widths, form),
        "most_bytes": most_bytes(base, recipe, name),
        "group_size": form.group_size if form.is_packed else None,
        "width": None if form.is_ragged else form.padded_width(widths),
        "parameters": parameters(base, widths),
        "clients": {client: dataclasses.asdict(found) for client, found in table.items()},
    }


def parameters(base: Description, widths: Widths) -> dict[str, int]:
    """Weights by where they sit, at these expert widths; `active` is those that a token meets.

    A token meets as many experts per layer as the router picks, of average width, and the
    embedding only in one row, which is not counted.
    """
    places = ("routed", "shared", "attention", "embeddings", "other")
    found: dict[str, int] = dict.fromkeys(places, 0)
    for name, shape in expected_tensors(base.family, base.config, widths).items():
        rule = base.family.rule(name)
        found[_place(name, rule.ours if rule else "")] += math.prod(shape)
    moe, total = base.config.moe, sum(found.values())
    picked = found["routed"] * moe.experts_per_token // moe.num_experts
    rows = base.config.vocab_size * base.config.d_model
    looked_up = 0 if base.config.tie_embeddings else rows
    return {"total": total, **found, "active": total - found["routed"] + picked - looked_up}


def _place(name: str, ours: str) -> str:
    if name in (EMBEDDING, LM_HEAD):
        return "embeddings"
    places = (("mlp.experts.", "routed"), ("mlp.shared.", "shared"), ("attention.", "attention"))
    return next((place for prefix, place in places if ours.startswith(prefix)), "other")


def memory(base: Description, recipe: CompressionRecipe) -> dict[str, int]:
    """Peak bytes of the host in the two stages that hold most; estimates.

    Scoring holds two layers, one more in the dtype of the activations at work, the hidden states of
    a chunk of windows and the sums three times; exporting two layers and their float32 copies.
    """
    c = base.config
    assert recipe.window is not None
    outer = (1 if c.tie_embeddings else 2) * c.vocab_size * c.d_model
    shapes = expected_tensors(base.family, c, base.widths)
    layers = [0] * c.num_layers
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += math.prod(shape)
    layer, item = max(layers), 2 if recipe.dtype == "bfloat16" else 4
    windows = min(CHUNK, math.ceil(recipe.max_tokens / recipe.window))
    states = windows * recipe.window * c.d_model * item
    states *= 1 + 2 * c.num_layers * recipe.gradients
    rows = recipe.batch * recipe.window * c.moe.experts_per_token
    work = rows * (4 * c.moe.d_expert + 4 * c.d_model) * 4
    fixed = PROCESS_BYTES + 2 * outer
    return {
        "scoring": int(
            fixed + LAYERS_HELD * 2 * layer + states + work + 3 * statistics_bytes(base, recipe)
        ),
        "export": int(fixed + LAYERS_HELD * 2 * layer + 4 * layer),
    }


def estimate_tables(found: dict[str, Any]) -> list[TextTable]:
    """An estimate for people: what it gives, who loads it, what it costs."""
    total = found["parameters"]
    header = ["", "total", "routed", "shared", "attention", "embeddings", "other", "active"]
    rows = [["dense", *(f"{total[key] / 1e6:,.1f} M" for key in header[1:])]]
    sizes, clients = [], []
    for name, one in found["exports"].items():
        rows.append([name, *(f"{one['parameters'][key] / 1e6:,.1f} M" for key in header[1:])])
        sizes.append([name, _megabytes(one["bytes"]), _megabytes(one["most_bytes"])])
        for client, verdict in one["clients"].items():
            clients.append([name, client, verdict["verdict"], verdict["rule"]])
    disk, seconds = found["disk"], found["scoring_seconds"]
    time = "not probed" if seconds is None else f"about {seconds:,.0f} s"
    costs = [
        ["memory to score (estimate)", _megabytes(found["memory"]["scoring"])],
        ["memory to export (estimate)", _megabytes(found["memory"]["export"])],
        [f"time to score {found['tokens']:,} tokens (estimate)", time],
        ["disk needed at most", _megabytes(disk["needed_bytes"])],
        ["disk free", _megabytes(disk["free_bytes"])],
    ]
    return [
        TextTable(f"Parameters at prune rate {found['prune_rate']}", header, rows),
        TextTable("On disk", ["format", "bytes", "at most"], sizes),
        TextTable("Who loads it", ["format", "client", "loads", "rule"], clients),
        TextTable("Costs", ["what", "how much"], costs),
    ]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
