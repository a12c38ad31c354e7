"""Mixture-of-Experts transformers as pytrees with a pure call."""

from typing import TYPE_CHECKING

from moe_jax.facade import lazy_face

if TYPE_CHECKING:
    from moe_jax.checkpointing import restore_model, save_model
    from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
    from moe_jax.errors import InputError
    from moe_jax.generation import generate
    from moe_jax.losses import language_model_loss
    from moe_jax.mesh import mesh_of
    from moe_jax.quant import QTensor
    from moe_jax.spread import Spread
    from moe_jax.stream import Batches, LayerSource, forward_hidden, in_batches, mapped, sweep
    from moe_jax.training import TrainingConfig, split_parameters, train
    from moe_jax.transformer import DecoderLayer, Transformer, abstract, init, next_token_loss

__all__ = [
    "AttentionConfig",
    "Batches",
    "DecoderLayer",
    "InputError",
    "LayerSource",
    "MoEConfig",
    "ModelConfig",
    "QTensor",
    "RopeConfig",
    "Spread",
    "TrainingConfig",
    "Transformer",
    "abstract",
    "forward_hidden",
    "generate",
    "in_batches",
    "init",
    "language_model_loss",
    "mapped",
    "mesh_of",
    "next_token_loss",
    "restore_model",
    "save_model",
    "split_parameters",
    "sweep",
    "train",
]

_HOMES = {
    "checkpointing": ("restore_model", "save_model"),
    "config": ("AttentionConfig", "ModelConfig", "MoEConfig", "RopeConfig"),
    "errors": ("InputError",),
    "generation": ("generate",),
    "mesh": ("mesh_of",),
    "quant": ("QTensor",),
    "spread": ("Spread",),
    "stream": ("Batches", "LayerSource", "forward_hidden", "in_batches", "mapped", "sweep"),
    "losses": ("language_model_loss",),
    "training": ("TrainingConfig", "split_parameters", "train"),
    "transformer": ("DecoderLayer", "Transformer", "abstract", "init", "next_token_loss"),
}
__getattr__, __dir__ = lazy_face(__name__, _HOMES)
