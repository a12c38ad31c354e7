"""What a channel of a gated network makes of its two projections, and the gradient of that."""

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.config import Activation


def gated(activation: Activation, gate: Array, up: Array) -> Array:
    """Hidden rows from gate and up rows."""
    gate, up = _bounded(activation, gate, up)
    hidden = gate * jax.nn.sigmoid(gate if activation.slope == 1 else activation.slope * gate)
    return hidden * (up + activation.shift if activation.shift else up)


def gated_gradient(
    activation: Activation, gate: Array, up: Array, d_hidden: Array
) -> tuple[Array, Array]:
    """Gradients at gate and up from the gradient at the hidden rows; zero beyond the limit."""
    slope, limit = activation.slope, activation.limit
    g, u = _bounded(activation, gate, up)
    turned = g if slope == 1 else slope * g
    sigmoid = jax.nn.sigmoid(turned)
    factor = u + activation.shift if activation.shift else u
    d_gate = d_hidden * factor * (sigmoid * (1 + turned * (1 - sigmoid)))
    d_up = d_hidden * g * sigmoid
    if limit is None:
        return d_gate, d_up
    return jnp.where(gate <= limit, d_gate, 0), jnp.where(jnp.abs(up) <= limit, d_up, 0)


def _bounded(activation: Activation, gate: Array, up: Array) -> tuple[Array, Array]:
    limit = activation.limit
    return (gate, up) if limit is None else (jnp.minimum(gate, limit), jnp.clip(up, -limit, limit))
