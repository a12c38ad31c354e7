"""Mixture-of-Experts transformers as pytrees with a pure call."""

import importlib
from typing import TYPE_CHECKING

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.quant import QTensor
from moe_jax.transformer import DecoderLayer, Transformer, init

if TYPE_CHECKING:
    from moe_jax.checkpointing import restore_model, save_model

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


def __getattr__(name: str):
    if name in ("restore_model", "save_model"):  # orbax takes long to import
        return getattr(importlib.import_module("moe_jax.checkpointing"), name)
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
