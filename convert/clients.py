"""Which program loads which export, and the facts that decide."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert.export import Export
from convert.export_format import FLOAT8_BLOCK, ExportFormat
from moe_jax.config import Activation, LatentAttentionConfig, ModelConfig, RopeConfig

T5, T4, VLLM, SGLANG, LLAMA = "transformers 5", "transformers 4.57", "vLLM", "SGLang", "llama.cpp"
RUNTIMES = (T5, T4, VLLM, SGLANG, LLAMA)
# Families whose folders were loaded in transformers 5 alone; the latter are more than a text model.
UNTRIED, WRAPPERS = ("glm4_moe_lite", "dots1"), ("qwen3_vl_moe", "glm4v_moe", "kimi_k25")
GPT_OSS = Activation(slope=1.702, shift=1.0, limit=7.0)  # as published
TORCH, SERVERS = (T5, T4), (VLLM, SGLANG)


@dataclass(frozen=True)
class Case:
    """One export as a client meets it.

    Attributes:
      form: the format.
      config: the architecture before pruning.
      hf: config.json of the export.
      widths: those that experts have in the folder, each once: one if it is padded.
      tensor_parallel: GPUs that share each layer.
    """

    form: ExportFormat
    config: ModelConfig
    hf: dict[str, Any]
    widths: tuple[int, ...]
    tensor_parallel: int = 1

    def cuts(self, size: int) -> bool:
        """Whether some GPU's share of an expert is no multiple of so many channels."""
        return any(width / self.tensor_parallel % size for width in self.widths)


@dataclass(frozen=True)
class Verdict:
    """Whether a client loads an export: "yes", "no" or "slower", and the fact that says so."""

    verdict: str
    rule: str


@dataclass(frozen=True)
class Fact:
    """`when` it holds, these clients answer `verdict` because of `words`."""

    runtimes: tuple[str, ...]
    verdict: str
    when: Callable[[Case], bool]
    words: str


def _ragged(case: Case) -> bool:
    return case.form.is_ragged


def _mixed(case: Case) -> bool:
    return bool(case.form.layer_bits)


def _custom(case: Case) -> bool:
    return not case.form.is_padded


def _integers(case: Case) -> bool:
    """Whether the experts of a layer are fused and in integers of few bits."""
    return case.form.is_integer and not case.form.is_ragged


def _integer8(case: Case) -> bool:
    return case.form.is_integer and not case.form.is_int4


def _float4(case: Case) -> bool:
    return case.form.is_float4


def _float8(case: Case) -> bool:
    return case.form.is_float8


def _idle_gpu(case: Case) -> bool:
    """Whether servers, which deal out whole blocks of 4-bit floats, leave a GPU without any."""
    gpus, blocks = case.tensor_parallel, case.widths[0] // case.form.group_size
    return _float4(case) and gpus > 1 and -(-blocks // gpus) * (gpus - 1) >= blocks


def _splits_heads(case: Case) -> bool:
    linear = case.config.linear_attention
    counts = [case.config.attention.num_heads]
    counts += [] if linear is None else [linear.num_key_heads, linear.num_value_heads]
    return not any(count % case.tensor_parallel for count in counts)


def _latent(case: Case) -> bool:
    return isinstance(case.config.attention, LatentAttentionConfig)


def _shares_keys(case: Case) -> bool:
    attention = case.config.attention
    return attention.num_kv_heads != attention.num_heads


def _rope(case: Case) -> RopeConfig:
    return case.config.attention.rope


def _linear(case: Case) -> bool:
    return case.config.linear_attention is not None


def _biased_next(case: Case) -> bool:
    return _is(case, "qwen3_next") and case.hf.get("attention_bias", False)


def _uneven_next(case: Case) -> bool:
    """Whether a Qwen3-Next has dense layers, or softmax attention at no one interval."""
    interval, c = case.hf.get("full_attention_interval", 4), case.config
    usual = tuple(i for i in range(c.num_layers) if (i + 1) % interval)
    return _is(case, "qwen3_next") and (bool(c.dense_layers) or c.linear_layers != usual)


def _two_head_widths(case: Case) -> bool:
    linear = case.config.linear_attention
    return linear is not None and linear.key_dim != linear.value_dim


def _is(case: Case, *types: str) -> bool:
    return case.hf["model_type"].removeprefix("ragged_") in types


def _yarn_mscale(case: Case) -> bool:
    rope = case.config.attention.rope
    return _is(case, "deepseek_v2") and rope.kind == "yarn" and bool(rope.mscale_all_dim)


# The first that holds decides. Known from programs run in 2026-11 on a CPU, but SGLang only as
# read in its source, and so for vLLM what its CPU build cannot run.
FACTS: tuple[Fact, ...] = (
    Fact((T4,), "no", lambda c: _is(c, "glm4_moe_lite", "kimi_k25"), "it has no such class"),
    Fact((LLAMA,), "no", lambda c: _is(c, *WRAPPERS),
         "never tried there: its converter splits such a model into two files"),
    Fact((VLLM,), "no", lambda c: _custom(c) and _is(c, *UNTRIED),
         "the modelling file was never run there for this family; export a padded format"),
    Fact((LLAMA,), "no", _custom, "it has one expert width per model; export a padded format"),
    Fact((SGLANG,), "no", _custom, "the modelling file was never run there; export a padded one"),
    Fact((VLLM,), "no", lambda c: _custom(c) and c.tensor_parallel > 1,
         "the modelling file was never split over GPUs; export a padded format"),
    Fact((LLAMA,), "no", lambda c: _is(c, "qwen2_moe") and bool(c.config.dense_layers),
         "its qwen2moe cannot have a dense layer"),
    Fact((SGLANG, LLAMA), "no", _uneven_next,
         "its Qwen3-Next has experts in every layer and softmax attention at one interval"),
    Fact((SGLANG,), "no", lambda c: _linear(c) and "full_attention_interval" not in c.hf,
         "config.json lacks full_attention_interval, by which alone it tells layers apart"),
    Fact((LLAMA,), "no", _two_head_widths,
         "its qwen3next has keys and values of linear attention of one width"),
    Fact((*SERVERS, LLAMA), "no", _biased_next, "its Qwen3-Next has no biases in attention"),
    Fact((LLAMA,), "no", lambda c: _is(c, "olmoe") and _shares_keys(c),
         "its olmoe has as many key as query heads"),
    Fact((LLAMA,), "no", lambda c: _is(c, "gpt_oss") and not _rope(c).truncate,
         "it truncates the bounds of YaRN whatever config.json says: other logits"),
    Fact((VLLM,), "no", lambda c: _custom(c) and _linear(c),
         "its transformers backend refuses linear attention; export a padded format"),
    Fact((LLAMA,), "no", lambda c: _is(c, "qwen3_moe") and not c.config.moe.renormalize,
         "its qwen3moe renormalises routing weights whatever norm_topk_prob says: other logits"),
    Fact((T4,), "no",
         lambda c: not _ragged(c) and _is(c, "gpt_oss") and c.config.moe.activation != GPT_OSS,
         "its activation is the published one whatever config.json says: other logits"),
    Fact((T4,), "no", _yarn_mscale, "it leaves out mscale_all_dim of YaRN: other logits"),
    Fact((VLLM, SGLANG), "no", lambda c: _is(c, "deepseek_v3") and c.hf.get("topk_method") is None,
         "config.json lacks topk_method='noaux_tc', without which vLLM has no router bias"),
    Fact(SERVERS, "no", lambda c: not _splits_heads(c),
         "the GPUs do not divide the number of attention heads, linear ones included"),
    Fact(SERVERS, "no", _idle_gpu, "there are too few blocks of 32 in an expert for the GPUs"),
    Fact(SERVERS, "no", lambda c: not (_ragged(c) or _float4(c)) and c.cuts(1),
         "the GPUs do not divide the expert width"),
    Fact(SERVERS, "no", lambda c: _integers(c) and c.config.d_model % c.form.group_size != 0,
         "the group size does not divide the model width"),
    Fact(SERVERS, "no", lambda c: _integers(c) and c.cuts(c.form.group_size),
         "the group size does not divide the expert width per GPU; use expert parallelism"),
    Fact(SERVERS, "no", lambda c: _float8(c) and c.cuts(FLOAT8_BLOCK),
         "the expert width per GPU is no multiple of the 128 channels of a block; use expert "
         "parallelism"),
    Fact((VLLM,), "slower", lambda c: _custom(c) and _latent(c),
         "trust_remote_code and VLLM_MLA_DISABLE=1: whole keys and values are cached, not latents"),
    Fact((VLLM,), "slower", _mixed,
         "trust_remote_code and enforce_eager; layers of several bits were never run there"),
    Fact((VLLM,), "slower", _ragged,
         "trust_remote_code and enforce_eager; a loop over experts, no fused kernel"),
    Fact(TORCH, "slower", _custom, "trust_remote_code; a loop over experts, no fused kernel"),
    Fact(SERVERS, "slower", lambda c: _integers(c) and c.config.d_model % 128 != 0,
         "Marlin kernels need a model width that is a multiple of 128"),
    Fact(SERVERS, "slower", lambda c: _integers(c) and c.cuts(64),
         "expert width per GPU is no multiple of 64: padded at every step"),
    Fact((T5,), "yes", _float4, "stock class; blocks are dequantised where no kernel reads them"),
    Fact((T4,), "yes", _float4, "stock class; equal in bfloat16"),
    Fact(SERVERS, "slower", lambda c: _float4(c) and c.cuts(c.form.group_size),
         "blocks of 32 are dealt out unevenly over the GPUs and padded; read, not run"),
    Fact(SERVERS, "yes", _float4, "stock class; read in its source, needs a GPU to run"),
    Fact((T5,), "yes", _float8,
         "needs accelerate; computes in 8 bits on GPUs that can, is dequantised elsewhere"),
    Fact((T4,), "yes", _float8, "needs accelerate; read in its source, not run"),
    Fact(SERVERS, "yes", _float8, "stock class; read in its source, needs a GPU to run"),
    Fact((LLAMA,), "yes", _float8, "its converter dequantises; read in its source, not run"),
    Fact((T4,), "yes", _integer8,
         "needs compressed-tensors and accelerate; never run there in 8 bits"),
    Fact(TORCH, "yes", _integers,
         "needs compressed-tensors and accelerate; dequantised at load, no memory saved"),
    Fact(SERVERS, "yes", _integer8,
         "stock class; its scheme of 8-bit integers was read, its experts were not, none was run"),
    Fact((LLAMA,), "yes", _integer8, "its converter dequantises; read in its source, not run"),
    Fact((VLLM, SGLANG, LLAMA), "yes", lambda c: _is(c, *UNTRIED, *WRAPPERS),
         "stock class, by its list of models; no folder of this family was ever run there"),
    Fact((T4,), "yes", lambda c: _is(c, *UNTRIED, *WRAPPERS),
         "stock class; no folder of this family was ever run there"),
    Fact((LLAMA,), "yes", _linear, "through its own converter, with --no-mtp"),
    Fact((LLAMA,), "yes", lambda c: _integers(c) and c.form.group_size == 32,
         "its converter dequantises; Q4_0 of its f16 file has the very same weights, if these were "
         "rounded to nearest"),
    Fact((LLAMA,), "yes", _integers,
         "its converter dequantises; its own 4 bits round a second time"),
    Fact((LLAMA,), "yes", lambda c: any(size % 256 for size in (*c.widths, c.config.d_model)),
         "through its converter; K-quants need widths that are multiples of 256, else they are "
         "replaced per tensor"),
    Fact((LLAMA,), "yes", lambda c: True, "through its own converter"),
    Fact((VLLM,), "yes", _custom,
         "trust_remote_code; its transformers backend fuses the experts of a layer"),
    Fact((VLLM,), "yes", _linear, "stock class; in bfloat16, which its linear attention needs"),
    Fact((VLLM,), "yes", _latent,
         "stock class; latent attention was only read: its CPU build is wrong without pruning too"),
    Fact((SGLANG,), "yes", lambda c: True, "stock class; read in its source, not run"),
    Fact(RUNTIMES, "yes", lambda c: True, "stock class, no custom code"),
)  # fmt: skip


def decide(runtime: str, case: Case) -> Verdict:
    """What the first fact that holds says."""
    fact = next(fact for fact in FACTS if runtime in fact.runtimes and fact.when(case))
    return Verdict(fact.verdict, fact.words)


def client_table(export: Export, tensor_parallel: int = 1) -> dict[str, Verdict]:
    """What every client says to an export.

    Args:
      export: the folder, which need not be there.
      tensor_parallel: GPUs that share each layer.

    Returns:
      Client -> verdict.
    """
    form, config = export.form, export.base.config
    stored = {count for counts in form.stored_widths(export.widths) for count in counts}
    case = Case(form, config, export.config, tuple(sorted(stored)), tensor_parallel)
    return {runtime: decide(runtime, case) for runtime in RUNTIMES}
