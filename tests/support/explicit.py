"""A tiny model written out token by token: the oracle of all that is measured while it runs.

transformers gives what enters and leaves every block of experts and the gradient there; the rest
are loops in float64 over tokens, experts and channels. Nothing here is shared with the library.
"""

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
    z: np.ndarray  # [D]
    d_z: np.ndarray  # [D]
    y: np.ndarray  # [D], routed output of the block
    q: float  # 1 / (|H|^2 + 1e-6), H the block's output with the residual stream


@dataclass
class Block:
    """A layer's experts: weights [F, D] of each, rows of each, and what every token has."""

    gate: list[np.ndarray]
    up: list[np.ndarray]
    down: list[np.ndarray]  # [F, D], the columns of W_down
    router: np.ndarray  # [E, D]
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
    """g, p, h [F] and z [D] of one expert on one token."""
    g, p = block.gate[e] @ x, block.up[e] @ x
    h = silu(g) * p
    return g, p, h, sum(h[c] * block.down[e][c] for c in range(len(h)))


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
        f"model.layers.{layer}.mlp.experts.down_proj": gate[:, None, None]
        * model.model.layers[layer].mlp.experts.down_proj
        for layer, gate in enumerate(() if gates is None else gates)
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
    """Every block of a qwen2_moe model in float64, and the summed next-token loss."""
    seen: dict[int, dict] = {layer: {} for layer in range(len(model.model.layers))}
    handles = []
    for index, layer in enumerate(model.model.layers):

        def entered(module, given, out, index=index):
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


def _block(layer, x, out, gradient, valid, top_k: int) -> Block:
    joined = layer.mlp.experts.gate_up_proj.detach().numpy()
    width = joined.shape[1] // 2
    down = layer.mlp.experts.down_proj.detach().numpy()
    block = Block(
        gate=[one[:width] for one in joined],
        up=[one[width:] for one in joined],
        down=[one.T for one in down],
        router=layer.mlp.gate.weight.detach().numpy(),
        norm=layer.post_attention_layernorm.weight.detach().numpy(),
        rows=[[] for _ in joined],
    )
    for b, t in zip(*np.nonzero(valid), strict=True):
        token = x[b, t]
        logits = block.router @ token
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        chosen = sorted(range(len(joined)), key=lambda e: -probability[e])[:top_k]
        parts = {e: expert(block, e, token) for e in chosen}
        y = sum(probability[e] * parts[e][3] for e in chosen)
        q = 1.0 / (out[b, t] @ out[b, t] + 1e-6)
        block.probability.append(probability)
        block.q.append(q)
        block.y.append(y)
        block.x.append(token)
        block.sequence.append(int(b))
        for e in chosen:
            w = float(probability[e])
            block.rows[e].append(Row(int(b), token, w, *parts[e], d_z=w * gradient[b, t], y=y, q=q))
    return block
