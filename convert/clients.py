"""Which program loads which export, and the rule that decides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert.description import Description
from convert.export import ExportFormat, export_config
from convert.rules import Widths
from moe_jax.config import Activation, LatentAttentionConfig, ModelConfig, RopeConfig

T5, T4, VLLM, SGLANG, LLAMA = "transformers 5", "transformers 4.57", "vLLM", "SGLang", "llama.cpp"
RUNTIMES = (T5, T4, VLLM, SGLANG, LLAMA)
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
    """Whether a client loads an export: "yes", "no" or "slower", and the rule that says so."""

    verdict: str
    rule: str


@dataclass(frozen=True)
class Rule:
    """`when` it holds, these clients answer `verdict` because of `words`."""

    runtimes: tuple[str, ...]
    verdict: str
    when: Callable[[Case], bool]
    words: str


def _ragged(case: Case) -> bool:
    return case.form.is_ragged


def _custom(case: Case) -> bool:
    return not case.form.is_padded


def _integer4(case: Case) -> bool:
    """Whether the experts of a layer are fused and in 4-bit integers."""
    return case.form.is_packed and not (case.form.is_ragged or case.form.is_float4)


def _float4(case: Case) -> bool:
    return case.form.is_float4


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


# The first rule that holds decides. Facts: programs run in 2026-11 on a CPU, but SGLang only as
# read in its source, and so for vLLM what its CPU build cannot run.
RULES: tuple[Rule, ...] = (
    Rule((LLAMA,), "no", _custom, "it has one expert width per model; export a padded format"),
    Rule((SGLANG,), "no", _custom, "the modelling file was never run there; export a padded one"),
    Rule((VLLM,), "no", lambda c: _custom(c) and c.tensor_parallel > 1,
         "the modelling file was never split over GPUs; export a padded format"),
    Rule((LLAMA,), "no", lambda c: _is(c, "qwen2_moe") and bool(c.config.dense_layers),
         "its qwen2moe cannot have a dense layer"),
    Rule((SGLANG, LLAMA), "no", _uneven_next,
         "its Qwen3-Next has experts in every layer and softmax attention at one interval"),
    Rule((SGLANG,), "no", lambda c: _linear(c) and "full_attention_interval" not in c.hf,
         "config.json lacks full_attention_interval, by which alone it tells layers apart"),
    Rule((LLAMA,), "no", _two_head_widths,
         "its qwen3next has keys and values of linear attention of one width"),
    Rule((*SERVERS, LLAMA), "no", _biased_next, "its Qwen3-Next has no biases in attention"),
    Rule((LLAMA,), "no", lambda c: _is(c, "olmoe") and _shares_keys(c),
         "its olmoe has as many key as query heads"),
    Rule((LLAMA,), "no", lambda c: _is(c, "gpt_oss") and not _rope(c).truncate,
         "it truncates the bounds of YaRN whatever config.json says: other logits"),
    Rule((VLLM,), "no", lambda c: _custom(c) and _linear(c),
         "its transformers backend refuses linear attention; export a padded format"),
    Rule((LLAMA,), "no", lambda c: _is(c, "qwen3_moe") and not c.config.moe.renormalize,
         "its qwen3moe renormalises routing weights whatever norm_topk_prob says: other logits"),
    Rule((T4,), "no",
         lambda c: not _ragged(c) and _is(c, "gpt_oss") and c.config.moe.activation != GPT_OSS,
         "its activation is the published one whatever config.json says: other logits"),
    Rule((T4,), "no", _yarn_mscale, "it leaves out mscale_all_dim of YaRN: other logits"),
    Rule((VLLM, SGLANG), "no", lambda c: _is(c, "deepseek_v3") and c.hf.get("topk_method") is None,
         "config.json lacks topk_method='noaux_tc', without which vLLM has no router bias"),
    Rule(SERVERS, "no", lambda c: not _splits_heads(c),
         "the GPUs do not divide the number of attention heads, linear ones included"),
    Rule(SERVERS, "no", _idle_gpu, "there are too few blocks of 32 in an expert for the GPUs"),
    Rule(SERVERS, "no", lambda c: not (_ragged(c) or _float4(c)) and c.cuts(1),
         "the GPUs do not divide the expert width"),
    Rule(SERVERS, "no", lambda c: _integer4(c) and c.config.d_model % c.form.group_size != 0,
         "the group size does not divide the model width"),
    Rule(SERVERS, "no", lambda c: _integer4(c) and c.cuts(c.form.group_size),
         "the group size does not divide the expert width per GPU; use expert parallelism"),
    Rule((VLLM,), "slower", lambda c: _custom(c) and _latent(c),
         "trust_remote_code and VLLM_MLA_DISABLE=1: whole keys and values are cached, not latents"),
    Rule((VLLM,), "slower", _ragged,
         "trust_remote_code and enforce_eager; a loop over experts, no fused kernel"),
    Rule(TORCH, "slower", _custom, "trust_remote_code; a loop over experts, no fused kernel"),
    Rule(SERVERS, "slower", lambda c: _integer4(c) and c.config.d_model % 128 != 0,
         "Marlin kernels need a model width that is a multiple of 128"),
    Rule(SERVERS, "slower", lambda c: _integer4(c) and c.cuts(64),
         "expert width per GPU is no multiple of 64: padded at every step"),
    Rule((T5,), "yes", _float4, "stock class; blocks are dequantised where no kernel reads them"),
    Rule((T4,), "yes", _float4, "stock class; equal in bfloat16"),
    Rule(SERVERS, "slower", lambda c: _float4(c) and c.cuts(c.form.group_size),
         "blocks of 32 are dealt out unevenly over the GPUs and padded; read, not run"),
    Rule(SERVERS, "yes", _float4, "stock class; read in its source, needs a GPU to run"),
    Rule(TORCH, "yes", _integer4,
         "needs compressed-tensors and accelerate; dequantised at load, no memory saved"),
    Rule((LLAMA,), "yes", _linear, "through its own converter, with --no-mtp"),
    Rule((LLAMA,), "yes", lambda c: _integer4(c) and c.form.group_size == 32,
         "its converter dequantises; Q4_0 of its f16 file has the very same weights, if these were "
         "rounded to nearest"),
    Rule((LLAMA,), "yes", _integer4,
         "its converter dequantises; its own 4 bits round a second time"),
    Rule((LLAMA,), "yes", lambda c: any(size % 256 for size in (*c.widths, c.config.d_model)),
         "through its converter; K-quants need widths that are multiples of 256, else they are "
         "replaced per tensor"),
    Rule((LLAMA,), "yes", lambda c: True, "through its own converter"),
    Rule((VLLM,), "yes", _custom,
         "trust_remote_code; its transformers backend fuses the experts of a layer"),
    Rule((VLLM,), "yes", _linear, "stock class; in bfloat16, which its linear attention needs"),
    Rule((VLLM,), "yes", _latent,
         "stock class; latent attention was only read: its CPU build is wrong without pruning too"),
    Rule((SGLANG,), "yes", lambda c: True, "stock class; read in its source, not run"),
    Rule(RUNTIMES, "yes", lambda c: True, "stock class, no custom code"),
)  # fmt: skip


def decide(runtime: str, case: Case) -> Verdict:
    """The first rule of the table that holds."""
    rule = next(rule for rule in RULES if runtime in rule.runtimes and rule.when(case))
    return Verdict(rule.verdict, rule.words)


def client_table(
    base: Description, widths: Widths, form: ExportFormat, tensor_parallel: int = 1
) -> dict[str, Verdict]:
    """What every client says to an export.

    Args:
      base: the dense model.
      widths: channels kept per layer and expert, () for dense layers.
      form: the format.
      tensor_parallel: GPUs that share each layer.

    Returns:
      Client -> verdict.
    """
    hf = export_config(base, widths, form)
    stored = {count for counts in form.stored_widths(widths) for count in counts}
    case = Case(form, base.config, hf, tuple(sorted(stored)), tensor_parallel)
    return {runtime: decide(runtime, case) for runtime in RUNTIMES}
