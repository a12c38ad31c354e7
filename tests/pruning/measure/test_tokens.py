"""Values of single tokens and losses of pruned experts, against the model in torch."""

import numpy as np
import pytest
import torch

from convert.checkpoint import open_checkpoint
from pruning.measure.loss_curves import expert_loss_curves
from pruning.measure.tokens import view_tokens
from tests.support import tiny

EXPERTS, CHANNELS, CHOSEN = 8, 16, 2  # of every layer of the tiny model


class Watched:
    """A tiny model in torch, and what went through its expert layers, the first one dense."""

    def __init__(self, folder):
        self.model = tiny.tiny_model("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[0])
        self.source = open_checkpoint(tiny.save(self.model, folder))
        self.tokens, self.valid = tiny.tokens_and_mask(2, 12)
        layers = list(self.model.model.layers)[1:]
        self.layers = [layer.mlp for layer in layers]
        self.inputs, self.middles, hooks = [], [], []
        for layer in layers:
            for module, seen in (
                (layer.post_attention_layernorm, self.middles), (layer.mlp, self.inputs),
            ):  # fmt: skip
                hooks.append(module.register_forward_pre_hook(recorder(seen)))
        tiny.torch_logits(self.model, self.tokens, self.valid)
        for hook in hooks:
            hook.remove()
        self.read = torch.tensor(self.valid)

    def output(self, slot: int) -> torch.Tensor:  # [N, D]
        """The residual stream after a layer of experts, at the valid tokens."""
        with torch.no_grad():
            out = self.layers[slot](self.inputs[slot])
        out = out[0] if isinstance(out, tuple) else out
        return (self.middles[slot] + out)[self.read].double()

    def routing(self, slot: int) -> torch.Tensor:  # [N, E]
        x = self.inputs[slot][self.read]
        return torch.softmax(x @ self.layers[slot].gate.weight.detach().T, dim=-1).double()


def recorder(seen: list):
    def record(module, arguments):
        seen.append(arguments[0].detach())

    return record


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Watched:
    return Watched(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def view(watched):
    return view_tokens(watched.source, watched.tokens, watched.valid, batch=1)


def test_entropies_are_those_of_the_router_in_torch(watched, view):
    assert view.entropy.shape == (2, watched.valid.sum())
    for slot in range(2):
        expected = torch.distributions.Categorical(watched.routing(slot)).entropy()
        np.testing.assert_allclose(view.entropy[slot], expected, rtol=1e-4)


def test_norms_are_those_of_the_experts_that_a_token_is_routed_to(watched, view):
    for slot, layer in enumerate(watched.layers):
        x = watched.inputs[slot][watched.read]
        chosen = torch.topk(watched.routing(slot), CHOSEN).indices
        for expert in range(EXPERTS):
            mine = x[(chosen == expert).any(dim=1)]
            gate, up = (mine @ layer.experts.gate_up_proj[expert].detach().T).chunk(2, dim=1)
            down = layer.experts.down_proj[expert].detach()
            norm = ((torch.nn.functional.silu(gate) * up) @ down.T).norm(dim=1)
            np.testing.assert_allclose(view.norms[slot][expert], norm, rtol=1e-4)
    assert sum(len(norm) for norm in view.norms[0]) == CHOSEN * watched.valid.sum()


def test_a_curve_is_the_loss_of_the_layer_with_the_lowest_channels_zeroed(watched):
    scores = np.random.default_rng(0).random((2, EXPERTS, CHANNELS))
    rates, losses = expert_loss_curves(
        watched.source, watched.tokens, watched.valid, scores, points=3, batch=1
    )
    np.testing.assert_array_equal(rates, [0, 0.5, 1])
    assert losses.shape == (2, EXPERTS, 3) and (losses[:, :, 0] == 0).all()
    for slot, layer in enumerate(watched.layers):
        whole, weights = watched.output(slot), layer.experts.down_proj.data
        for expert in range(EXPERTS):
            for place, count in ((1, CHANNELS // 2), (2, CHANNELS)):
                kept = weights.clone()
                weights[expert][:, np.argsort(scores[slot, expert])[:count]] = 0
                lost = (whole - watched.output(slot)).square().sum(1) / whole.square().sum(1)
                weights.copy_(kept)
                np.testing.assert_allclose(
                    losses[slot, expert, place], lost.mean(), rtol=1e-3, atol=1e-9
                )
    assert losses[:, :, 2].max() > 0.01


def test_a_curve_has_nine_points_unless_told_otherwise(watched):
    scores = np.random.default_rng(0).random((2, EXPERTS, CHANNELS))
    rates, losses = expert_loss_curves(watched.source, watched.tokens, watched.valid, scores)
    np.testing.assert_array_equal(rates, np.rint(np.linspace(0, 1, 9) * CHANNELS) / CHANNELS)
    assert losses.shape == (2, EXPERTS, 9)
