"""What a recovery trained as an adapter of PEFT, for the padded export of its student.

Modules have the names of the folder's own tensors, an expert's matrices each its own. PEFT itself
packs them for versions of transformers that hold all experts of a layer in one parameter.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from convert.checkpoint import open_checkpoint
from convert.rules import Family, TensorRule, layer_rules
from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.files import replace_file, replace_text
from pruning.recipe.recover_options import RecoverOptions
from pruning.recovery.deltas import DeltaConfig, Deltas
from pruning.recovery.forward import layer_deltas
from pruning.stages.made_by import OLDER, is_repaired, stale_exports
from pruning.stages.recovered import Student

FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYOUT = "padded-bf16"  # of the folder that it adapts
ROUTER, EXPERTS, ATTENTION = "mlp.router", "mlp.experts.", "attention."

Factors = tuple[np.ndarray, np.ndarray]  # float32 [r, in] and [out, r], a change their product


def check_adapter(student: Student, options: RecoverOptions) -> None:
    """Raise InputError if PEFT knows no adapter for what these filled options train."""
    family = student.base.about.family
    what = {
        "dora": "PEFT has no DoRA for experts that transformers holds in one parameter",
        "full": "it trains whole weights, which are no adapter",
    }
    if options.train in what:
        raise InputError(
            f"adapter=True and train={options.train!r}: {what[options.train]}; choose --train lora"
        )
    if not options.router_rank:
        raise InputError(
            f"adapter=True and router_rank={options.router_rank}, which trains whole matrices; "
            "choose e.g. --router-rank 4"
        )
    if family.together or family.twin is not None:
        raise InputError(
            f"adapter=True: folders of {family.model_type} hold the experts of a layer in one "
            "tensor or under another family's names, and PEFT's adapters have a name for each; "
            "leave it out: exports have the changes merged"
        )
    base = padded_folder(student)
    if not (base / "config.json").is_file():
        raise InputError(
            f"adapter=True is for {base}, which is not there; write it first: `moe-compress export "
            f"{student.run} --export {LAYOUT}`"
        )
    if base.absolute() in [path.absolute() for path in stale_exports(student.run, student.plan)]:
        raise InputError(f"{base}: {OLDER}")
    if is_repaired(base) != (student.repair is not None):
        raise InputError(
            f"adapter=True is for {base}, which is {'' if is_repaired(base) else 'not '}repaired "
            "and the weights that are trained are other ones; name the run's folder, and write "
            f"that export again: `moe-compress export {student.run} --export {LAYOUT} --overwrite`"
        )


def padded_folder(student: Student) -> Path:
    """The export of the student that its adapter is for."""
    return student.run / "exports" / LAYOUT


def write_adapter(student: Student, deltas: Deltas, config: DeltaConfig, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    All pairs of factors have one rank, the largest, and are filled up with zeros; what a product
    counts is in the second of them, so that PEFT's `lora_alpha / r` is 1.

    Args:
      student: what was trained, of which `check_adapter` found nothing to say.
      deltas: what was trained, "lora" or the router by a rank of its own.
      config: of the changes.
      folder: to write; replaced files are whole or the old ones.
    """
    base, family = open_checkpoint(padded_folder(student)), student.base.about.family
    found: dict[str, Factors] = {}
    for index in range(len(student.source)):
        own = jax.device_get(layer_deltas(deltas, index))
        mlp = student.source.layer(index).mlp
        for rule, name in layer_rules(family.rules, student.base.config, index):
            module = _module(family, name)
            if rule.ours == ROUTER and "router" in own:
                ratio = config.router_alpha / own["router"]["down"].shape[0]
                found[module] = _matrix(own["router"], ratio)
            elif rule.ours.startswith(EXPERTS) and "experts" in own and isinstance(mlp, MoE):
                change = own["experts"].get(rule.ours.removeprefix(EXPERTS))
                if change is not None:
                    width, ratio = base.config.moe.d_expert, config.alpha / config.rank
                    found |= _experts(rule, module, change, mlp.experts, width, ratio)
            elif rule.ours.startswith(ATTENTION) and "attention" in own:
                change = own["attention"].get(rule.ours.removeprefix(ATTENTION))
                if change is not None:
                    found[module] = _matrix(change, config.alpha / config.rank)
    rank = max(len(down) for down, _ in found.values())
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(found, rank))
    replace_file(folder / WEIGHTS, lambda partial: save_file(tensors, partial, {"format": "pt"}))
    told = _config(padded_folder(student), sorted(found), rank)
    replace_text(folder / CONFIG, json.dumps(told, indent=2) + "\n")


def _module(family: Family, name: str) -> str:
    stored = family.wrapper.stored(name) if family.wrapper else name
    return stored.removesuffix(".weight")


def _matrix(change: dict[str, np.ndarray], ratio: float) -> Factors:
    return change["down"], ratio * change["up"]


def _experts(
    rule: TensorRule,
    module: str,
    change: dict[str, np.ndarray],
    experts: Experts,
    width: int,
    ratio: float,
) -> dict[str, Factors]:
    """The factors of each expert, at the width of the padded folder: zeros behind its channels."""
    ends = np.cumsum(np.asarray(experts.count))
    found = {}
    for expert, (end, count) in enumerate(zip(ends, np.asarray(experts.count), strict=True)):
        channel = np.zeros((width, change["channel"].shape[1]), np.float32)
        channel[:count] = change["channel"][end - count : end]
        own = change["expert"][expert]
        is_down = rule.layout == "expert_columns"  # [D, F]: channels are its inputs
        pair = (channel.T, ratio * own.T) if is_down else (own, ratio * channel)
        found[module.replace("{expert}", str(expert))] = pair
    return found


def _tensors(found: dict[str, Factors], rank: int) -> Iterator[tuple[str, np.ndarray]]:
    for module, (down, up) in found.items():
        more = rank - len(down)
        place = f"base_model.model.{module}"
        # safetensors writes memory as it lies, which of a transposed array is another array.
        yield f"{place}.lora_A.weight", np.ascontiguousarray(np.pad(down, ((0, more), (0, 0))))
        yield f"{place}.lora_B.weight", np.ascontiguousarray(np.pad(up, ((0, 0), (0, more))))


def _config(base: Path, modules: list[str], rank: int) -> dict[str, Any]:
    """What `LoraConfig` reads; modules below a layer, so that no others of their names match."""
    below = {module.partition(".layers.")[2].partition(".")[2] for module in modules}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.absolute()),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(below),
    }
