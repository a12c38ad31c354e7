"""Mixture-of-Experts transformers as pytrees with a pure call."""

from typing import TYPE_CHECKING

from moe_jax.facade import lazy_face

if TYPE_CHECKING:
    from moe_jax.checkpointing import restore_model, save_model
    from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
    from moe_jax.errors import InputError
    from moe_jax.quant import QTensor
    from moe_jax.transformer import DecoderLayer, Transformer, init

__all__ = [
    "AttentionConfig",
    "DecoderLayer",
    "InputError",
    "MoEConfig",
    "ModelConfig",
    "QTensor",
    "RopeConfig",
    "Transformer",
    "init",
    "restore_model",
    "save_model",
]

_HOMES = {
    "checkpointing": ("restore_model", "save_model"),
    "config": ("AttentionConfig", "ModelConfig", "MoEConfig", "RopeConfig"),
    "errors": ("InputError",),
    "quant": ("QTensor",),
    "transformer": ("DecoderLayer", "Transformer", "init"),
}
__getattr__, __dir__ = lazy_face(__name__, _HOMES)
