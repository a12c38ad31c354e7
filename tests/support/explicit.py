"""A tiny model written out token by token: the oracle of all that is measured while it runs.

transformers gives what enters and leaves every block of experts and the gradient there; the rest
are loops in float64 over tokens, experts and channels. Nothing here is shared with the library.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Row:
    """One token in one of its experts: routing weight w, g, p, h and z of the expert, dloss/dz."""

    sequence: int
    x: np.ndarray  # [D], what enters the block
    w: float
    g: np.ndarray  # [F]
    p: np.ndarray  # [F]
    h: np.ndarray  # [F]
    h_g: np.ndarray  # [F], dh/dg
    h_p: np.ndarray  # [F], dh/dp
    z: np.ndarray  # [D]
    d_z: np.ndarray  # [D]
    y: np.ndarray  # [D], routed output of the block
    q: float  # 1 / (|H|^2 + 1e-6), H the block's output with the residual stream


@dataclass(frozen=True)
class Biases:
    """What gpt-oss adds to an expert's projections."""

    gate: np.ndarray  # [F]
    up: np.ndarray  # [F]
    down: np.ndarray  # [D]


@dataclass
class Block:
    """A layer's experts: weights [F, D] of each, rows of each, and what every token has."""

    gate: list[np.ndarray]
    up: list[np.ndarray]
    down: list[np.ndarray]  # [F, D], the columns of W_down
    router: np.ndarray  # [E, D]
    router_bias: np.ndarray  # [E]
    bias: list[Biases]  # of each expert; [] but for gpt-oss
    limit: float  # of g and of |p| in gpt-oss
    norm: np.ndarray  # [D], weight of the norm before the experts
    rows: list[list[Row]]
    probability: list[np.ndarray] = field(default_factory=list)  # [E] of each token
    q: list[float] = field(default_factory=list)
    y: list[np.ndarray] = field(default_factory=list)
    x: list[np.ndarray] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)


def silu(value: np.ndarray) -> np.ndarray:
    """x times its logistic function."""
    return value / (1.0 + np.exp(-value))


def expert(block: Block, e: int, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """g, p, h, dh/dg, dh/dp [F] and z [D] of one expert on one token."""
    g, p = block.gate[e] @ x, block.up[e] @ x
    if not block.bias:
        s = 1.0 / (1.0 + np.exp(-g))
        h, h_g, h_p = silu(g) * p, p * s * (1.0 + g * (1.0 - s)), silu(g)
        return g, p, h, h_g, h_p, sum(h[c] * block.down[e][c] for c in range(len(h)))
    bias = block.bias[e]
    g, p = g + bias.gate, p + bias.up
    low, held = np.minimum(g, block.limit), np.clip(p, -block.limit, block.limit) + 1.0
    s = 1.0 / (1.0 + np.exp(-1.702 * low))
    h = held * low * s
    h_g = np.where(g <= block.limit, held * s * (1.0 + 1.702 * low * (1.0 - s)), 0.0)
    h_p = np.where(np.abs(p) <= block.limit, low * s, 0.0)
    return g, p, h, h_g, h_p, sum(h[c] * block.down[e][c] for c in range(len(h))) + bias.down


def total_loss(
    model, tokens: np.ndarray, valid: np.ndarray, gates=None, counted: np.ndarray | None = None
) -> torch.Tensor:
    """Summed next-token loss of a transformers model, the output of each expert times its gate.

    Args:
      model: float64.
      tokens: [B, T].
      valid: [B, T].
      gates: tensors [E] by layer, or None.
      counted: [B, T], tokens whose prediction counts; None for all.
    """
    changed = {
        f"model.layers.{layer}.mlp.experts.{name}": gate.view(-1, *[1] * (value.ndim - 1)) * value
        for layer, gate in enumerate(() if gates is None else gates)
        for name, value in model.model.layers[layer].mlp.experts.named_parameters()
        if name in ("down_proj", "down_proj_bias")
    }
    given = {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "attention_mask": torch.tensor(valid, dtype=torch.long),
        "use_cache": False,
    }
    logits = torch.func.functional_call(model, changed, (), given).logits
    sure = torch.log_softmax(logits[:, :-1], dim=-1)
    nll = -sure.gather(-1, given["input_ids"][:, 1:, None])[..., 0]
    said = valid if counted is None else valid & counted
    return nll[torch.tensor(valid[:, :-1] & said[:, 1:])].sum()


def write_out(
    model, tokens: np.ndarray, valid: np.ndarray, top_k: int
) -> tuple[list[Block], float]:
    """Every block of a qwen2_moe or gpt_oss model in float64, and the summed next-token loss."""
    seen: dict[int, dict] = {layer: {} for layer in range(len(model.model.layers))}
    handles = []
    for index, layer in enumerate(model.model.layers):

        def entered(module, given, out, index=index):
            out = out[0] if isinstance(out, tuple) else out
            out.retain_grad()
            seen[index] |= {"x": given[0], "out": out}

        def left(module, given, out, index=index):
            seen[index]["H"] = out

        handles += [layer.mlp.register_forward_hook(entered), layer.register_forward_hook(left)]
    loss = total_loss(model, tokens, valid)
    loss.backward()
    for handle in handles:
        handle.remove()
    blocks = []
    for index, layer in enumerate(model.model.layers):
        x, out, gradient = (
            value.detach().numpy()
            for value in (seen[index]["x"], seen[index]["H"], seen[index]["out"].grad)
        )
        blocks.append(_block(layer, x, out, gradient, valid, top_k))
    model.zero_grad()
    return blocks, loss.item()


def _experts(layer) -> Block:
    """The weights of a layer, nothing routed yet."""
    weights = {name: w.detach().numpy() for name, w in layer.mlp.experts.named_parameters()}
    joined, down = weights["gate_up_proj"], weights["down_proj"]
    norm = layer.post_attention_layernorm.weight.detach().numpy()
    rows = [[] for _ in joined]
    if "down_proj_bias" not in weights:  # [E, 2 F, D] and [E, D, F]
        width = joined.shape[1] // 2
        router = layer.mlp.gate.weight.detach().numpy()
        return Block(
            gate=[one[:width] for one in joined], up=[one[width:] for one in joined],
            down=[one.T for one in down], router=router, router_bias=np.zeros(len(router)),
            bias=[], limit=math.inf, norm=norm, rows=rows,
        )  # fmt: skip
    both = zip(weights["gate_up_proj_bias"], weights["down_proj_bias"], strict=True)
    return Block(  # [E, D, 2 F], gate and up in turn, and [E, F, D]
        gate=[one[:, ::2].T for one in joined], up=[one[:, 1::2].T for one in joined],
        down=list(down), router=layer.mlp.router.weight.detach().numpy(),
        router_bias=layer.mlp.router.bias.detach().numpy(),
        bias=[Biases(gate=one[::2], up=one[1::2], down=two) for one, two in both],
        limit=layer.mlp.experts.limit, norm=norm, rows=rows,
    )  # fmt: skip


def _block(layer, x, out, gradient, valid, top_k: int) -> Block:
    block = _experts(layer)
    for b, t in zip(*np.nonzero(valid), strict=True):
        token = x[b, t]
        logits = block.router @ token + block.router_bias
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        chosen = sorted(range(len(logits)), key=lambda e: -probability[e])[:top_k]
        # gpt-oss takes the softmax of the chosen alone.
        share = probability[chosen].sum() if block.bias else 1.0
        parts = {e: expert(block, e, token) for e in chosen}
        y = sum(probability[e] / share * parts[e][-1] for e in chosen)
        q = 1.0 / (out[b, t] @ out[b, t] + 1e-6)
        block.probability.append(probability)
        block.q.append(q)
        block.y.append(y)
        block.x.append(token)
        block.sequence.append(int(b))
        for e in chosen:
            w = float(probability[e] / share)
            block.rows[e].append(Row(int(b), token, w, *parts[e], d_z=w * gradient[b, t], y=y, q=q))
    return block
