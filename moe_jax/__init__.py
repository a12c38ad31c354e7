"""Mixture-of-Experts transformers as pytrees with a pure call."""

from moe_jax.checkpointing import restore_model, save_model
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.quant import QTensor
from moe_jax.transformer import DecoderLayer, Transformer, init

__all__ = [
    "AttentionConfig",
    "DecoderLayer",
    "MoEConfig",
    "ModelConfig",
    "QTensor",
    "RopeConfig",
    "Transformer",
    "init",
    "restore_model",
    "save_model",
]
