"""Small pruned models in every export format, as every client can load them, and our logits."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from convert import open_checkpoint
from convert.clients import Verdict, client_table
from convert.export import Export
from convert.export_format import ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from tests.support import tiny
from tests.support.logits import logits

TOKENS = np.random.default_rng(1).integers(0, 256, (2, 10)).astype(np.int32)
# Channels of the eight experts of two layers, whole groups: some without any, some with all, and
# layers that differ in their widest.
COUNTS = np.array([[0, 32, 64, 32, 32, 64, 0, 32], [32, 96, 32, 32, 0, 32, 64, 32]])
# More rows than tokens, as in published models; vLLM on a CPU needs heads of 32 or more.
SIZES = {
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 96,
    "head_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Latent attention has kernels for the published sizes only.
LATENT = {
    "head_dim": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
FAMILIES: dict[str, dict] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "qwen3_moe": {"norm_topk_prob": True},  # as published; llama.cpp renormalises regardless
    # llama.cpp wants keys and values of one width, vLLM on a CPU that of published models.
    "qwen3_next": {
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "full_attention_interval": 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "mixtral": {"intermediate_size": 96},
    "olmoe": {"intermediate_size": 96, "num_key_value_heads": 4},  # llama.cpp has no groups here
    # llama.cpp asks so small a model for a query rank, vLLM for groups even if there is one.
    "deepseek_v2": LATENT | {"q_lora_rank": 64, "n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT | {"n_group": 2, "topk_group": 1, "q_lora_rank": 64},
    "kimi_k2": LATENT | {"n_group": 1, "topk_group": 1, "q_lora_rank": 64},
    "deepseek": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "qkv_bias": False,
        "shared_expert_intermediate_size": 96,
    },
    "glm4_moe": {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "glm4_moe_lite": LATENT | {"q_lora_rank": 64, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots1": {"num_hidden_layers": 3, "first_k_dense_replace": 1, "sliding_window": None},
    # Only transformers 5 reads the limit from the config; llama.cpp always truncates YaRN's bounds.
    "gpt_oss": {
        "intermediate_size": 96,
        "head_dim": 64,
        "swiglu_limit": 7.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
            "original_max_position_embeddings": 4096,
        },
    },
}


# Families that transformers lacks, and the one whose tensors and config are renamed to theirs.
MADE_OF = {"kimi_k2": "deepseek_v3", "deepseek": "qwen2_moe"}


@dataclass(frozen=True)
class Case:
    """One exported folder.

    Attributes:
      family: of `FAMILIES`.
      form: name of the format.
      folder: where it lies.
      logits: float32 [B, T, V] that it stands for.
      verdicts: what `convert.clients` says of each client.
    """

    family: str
    form: str
    folder: Path
    logits: np.ndarray
    verdicts: Mapping[str, Verdict]


def cases(families: list[str], forms: list[str], work: Path) -> Iterator[Case]:
    """Build, prune and export.

    Args:
      families: of `FAMILIES`.
      forms: names of formats; those that a family lacks are left out.
      work: empty folder.

    Yields:
      The cases; a four-bit one has the logits of the rounded model.
    """
    for family in families:
        base = open_checkpoint(_published(family, work / family), dtype=jnp.bfloat16)
        rng = np.random.default_rng(0)
        keep = np.zeros((2, 8, 96), bool)
        for place in np.ndindex(2, 8):
            keep[place][rng.permutation(96)[: COUNTS[place]]] = True
        plan = PruningPlan(keep, base.config.moe_layers, {"model_hash": base.fingerprint})
        counts = dict(zip(plan.layer_indices, plan.counts.tolist(), strict=True))
        widths = tuple(tuple(counts.get(index, ())) for index in range(len(base)))
        pruned = PrunedSource(base, plan)
        for name in (name for name in base.about.family.formats if name in forms):
            form = ExportFormat(name, 32)
            folder = work / f"{family}-{name}"
            export = Export(base.about, widths, form)
            export.write(pruned, folder)
            source = QuantizedSource(pruned, 32, form.storage) if form.is_packed else pruned
            verdicts = client_table(export)
            yield Case(family, name, folder, logits(source, TOKENS), verdicts)


def _published(family: str, folder: Path) -> Path:
    """A random checkpoint in bfloat16, as hubs have it: with what only config.json files know."""
    made_of = MADE_OF.get(family, family)
    model = tiny.tiny_model(made_of, **(SIZES | FAMILIES[family]))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(0.35)  # a gain of about one per matrix
    if made_of == "deepseek_v3":
        model.config.topk_method, model.config.scoring_func = "noaux_tc", "sigmoid"
    _add_tokenizer(tiny.save(tiny.half(model), folder))
    if family == "kimi_k2":
        _change_config(folder, model_type="kimi_k2")
    elif family == "deepseek":
        _make_deepseek(folder)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}  # another adds tokens of its own
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


def _change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _make_deepseek(folder: Path) -> None:
    """Turn a Qwen2-MoE without biases into a DeepSeek V1, whose shared expert has no gate."""
    path = folder / "model.safetensors"
    tensors = {
        name.replace(".shared_expert.", ".shared_experts."): value
        for name, value in load_file(path).items()
        if "shared_expert_gate" not in name
    }
    save_file(tensors, path, metadata={"format": "pt"})
    counts = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
    _change_config(folder, model_type="deepseek", **counts)


def _add_tokenizer(folder: Path) -> None:
    """Bytes and, since llama.cpp refuses a tokenizer that merges nothing, one pair of them."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"ab": len(vocabulary)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # llama.cpp's converter looks these up for GLM-4.
    tokenizer.add_special_tokens(["[gMASK]", "<|endoftext|>", "<|user|>", "<|observation|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
