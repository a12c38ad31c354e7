"""The code that travels inside exports, imported as it is: experts against numpy, and which models
get which. Whole folders are loaded in `families/test_families`."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from convert.formats import modeling_ragged_moe as code

D = 6
NAMES = ("gate_proj", "up_proj", "down_proj")


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module.double()


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def swiglu(expert, x: np.ndarray) -> np.ndarray:
    gate, up, down = (array(getattr(expert, name).weight) for name in expert.names)
    gated = x @ gate.T
    return (gated * sigmoid(gated) * (x @ up.T)) @ down.T


X = np.random.default_rng(0).normal(size=(7, D))


@pytest.mark.parametrize("names", [NAMES, ("w1", "w3", "w2")])
def test_an_expert_is_a_network_of_its_width_or_nothing_or_a_constant(names):
    config = SimpleNamespace(hidden_size=D)
    expert: Any = drawn(code.RaggedExpert(config, 4, names, True))
    shapes = {name: tuple(p.shape) for name, p in expert.named_parameters()}
    gate, up, down = (f"{name}.weight" for name in names)
    assert shapes == {gate: (4, D), up: (4, D), down: (D, 4)}
    np.testing.assert_allclose(array(expert(torch.tensor(X))), swiglu(expert, X))
    nothing: Any = code.RaggedExpert(config, 0, names, False)
    assert not list(nothing.parameters()) and not nothing(torch.tensor(X)).any()
    assert nothing(torch.tensor(X)).shape == X.shape
    constant: Any = drawn(code.RaggedExpert(config, 0, names, True))
    assert [name for name, _ in constant.named_parameters()] == ["constant"]
    found = array(constant(torch.tensor(X)))
    np.testing.assert_array_equal(found, np.tile(array(constant.constant), (7, 1)))


def oss(expert, x: np.ndarray, alpha: float, limit: float) -> np.ndarray:
    def linear(layer, x):
        return x @ array(layer.weight).T + array(layer.bias)

    gate = np.minimum(linear(expert.gate_proj, x), limit)
    up = np.clip(linear(expert.up_proj, x), -limit, limit)
    return linear(expert.down_proj, (up + 1) * gate * sigmoid(gate * alpha))


@pytest.mark.parametrize(("said", "alpha", "limit"), [
    ({}, 1.702, 7.0), ({"swiglu_alpha": 0.9, "swiglu_limit": 0.6}, 0.9, 0.6),
])  # fmt: skip
def test_an_expert_of_gpt_oss_has_biases_and_bounds(said, alpha, limit):
    config = SimpleNamespace(hidden_size=D, **said)
    expert: Any = drawn(code.GptOssExpert(config, 4, NAMES, False))
    x = 4 * X  # beyond the bounds
    np.testing.assert_allclose(array(expert(torch.tensor(x))), oss(expert, x, alpha, limit))
    empty: Any = drawn(code.GptOssExpert(config, 0, NAMES, False))
    assert [name for name, _ in empty.named_parameters()] == ["down_proj.bias"]
    found = array(empty(torch.tensor(x)))
    np.testing.assert_array_equal(found, np.tile(array(empty.down_proj.bias), (7, 1)))


INDEX = np.array([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0], [0, 2], [1, 2]])
WEIGHT = np.random.default_rng(1).random((7, 2))


def summed(experts, run) -> np.ndarray:
    out = np.zeros((7, D))
    for token, slot in np.ndindex(7, 2):
        expert = experts[INDEX[token, slot]]
        out[token] += WEIGHT[token, slot] * run(expert, X[[token]])[0]
    return out


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(X), torch.tensor(INDEX), torch.tensor(WEIGHT)


def test_tokens_get_the_weighted_sum_of_their_experts():
    config = SimpleNamespace(hidden_size=D)
    ragged: Any = drawn(code.RaggedExperts(config, [4, 0, 3], NAMES, False))
    assert len(ragged) == 3 and [ragged[i].width for i in range(3)] == [4, 0, 3]
    assert {name.partition(".")[0] for name, _ in ragged.named_parameters()} == {"0", "2"}
    assert not isinstance(ragged, torch.nn.ModuleList)
    plain = lambda expert, x: swiglu(expert, x) if expert.width else 0 * x  # noqa: E731
    np.testing.assert_allclose(array(ragged(*given())), summed(ragged, plain))
    alike = code.LayeredExperts(code.RaggedExpert(config, 4, NAMES, False) for _ in range(3))
    assert isinstance(alike, torch.nn.ModuleList)
    np.testing.assert_allclose(array(drawn(alike)(*given())), summed(alike, swiglu))


def test_blocks_of_gpt_oss_may_give_weights_of_all_experts():
    config = SimpleNamespace(hidden_size=D)
    experts: Any = drawn(code.RaggedGptOssExperts(config, [4, 0, 3], NAMES, False))
    run = lambda e, x: oss(e, x, 1.702, 7.0) if e.width else x * 0 + array(e.down_proj.bias)  # noqa: E731
    wanted = summed(experts, run)
    np.testing.assert_allclose(array(experts(*given())), wanted)
    x, index, weight = given()
    whole = torch.zeros(7, 3, dtype=weight.dtype).scatter(1, index, weight)
    found = experts(x.reshape(1, 7, D), index, whole)
    assert found.shape == (1, 7, D)
    np.testing.assert_allclose(array(found)[0], wanted)


SIZES = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 12, "mlp_only_layers": [1], "decoder_sparse_step": 1,
}  # fmt: skip


def widths(model) -> list[list[int]]:
    layers = getattr(model, "model", model).layers
    blocks = [layer.mlp for layer in layers]
    return [
        [block.experts[i].width for i in range(len(block.experts))] if hasattr(block, "experts")
        else [] for block in blocks
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["Model", "ForCausalLM"])
def test_a_ragged_model_has_experts_of_the_widths_that_its_config_says(kind):
    wanted = [[4, 0, 6], [], [2, 8, 8]]
    made = getattr(code, f"RaggedQwen2Moe{kind}")
    config = made.config_class(**SIZES, moe_intermediate_size=8, expert_intermediate_sizes=wanted)
    model = made(config)
    assert widths(model) == wanted and made.__name__ == f"RaggedQwen2Moe{kind}"
    assert issubclass(made, getattr(transformers, f"Qwen2Moe{kind}"))
    assert config.model_type == "ragged_qwen2_moe" and made.__module__ == code.__name__
    blocks = getattr(model, "model", model).layers
    assert blocks[0].mlp.experts[1].constant is None
    config.emptied_experts = "constant"
    again = made(config)
    assert getattr(again, "model", again).layers[0].mlp.experts[1].constant is not None
    assert not model._can_compile_fullgraph


def test_a_layered_model_has_one_width_a_layer_and_stock_shared_experts():
    made = code.RaggedDeepseekV3Model
    config = made.config_class(
        vocab_size=20, hidden_size=8, intermediate_size=10, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None,
        kv_lora_rank=4, qk_rope_head_dim=2, qk_nope_head_dim=2, v_head_dim=4,
        moe_intermediate_size=[0, 3, 5], unpruned_intermediate_size=7,
    )  # fmt: skip
    model = made(config)
    assert widths(model) == [[], [3] * 4, [5] * 4]
    assert config.moe_intermediate_size == [0, 3, 5]
    for layer in model.layers[1:]:
        assert layer.mlp.shared_experts.gate_proj.weight.shape[0] == 2 * 7
        assert isinstance(layer.mlp.experts, code.LayeredExperts)
    config.moe_intermediate_size = [0, 0, 5]
    emptied = made(config).layers[1].mlp.experts
    assert not list(emptied.parameters()) and len(emptied) == 4
    stock = SimpleNamespace(moe_intermediate_size=5)
    with code._stock_width(stock):
        assert stock.moe_intermediate_size == 5
    said = SimpleNamespace(moe_intermediate_size=[3], unpruned_intermediate_size=7)
    with pytest.raises(KeyError), code._stock_width(said):
        assert said.moe_intermediate_size == 7
        raise KeyError
    assert said.moe_intermediate_size == [3]


def test_gpt_oss_and_mixtral_have_what_is_theirs():
    made: Any = code.RaggedGptOssForCausalLM
    config = made.config_class(
        vocab_size=20, hidden_size=8, intermediate_size=10, num_hidden_layers=1, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["full_attention"], expert_intermediate_sizes=[[3, 0]],
    )  # fmt: skip
    experts = made(config).model.layers[0].mlp.experts
    assert isinstance(experts, code.RaggedGptOssExperts)
    assert isinstance(experts[0], code.GptOssExpert) and widths(made(config)) == [[3, 0]]
    made = code.RaggedMixtralForCausalLM
    config = made.config_class(
        vocab_size=20, hidden_size=8, intermediate_size=10, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        expert_intermediate_sizes=[[3, 5]],
    )  # fmt: skip
    layer = made(config).model.layers[0]
    block = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
    assert {name for name, _ in block.experts[1].named_parameters()} == {
        "w1.weight", "w2.weight", "w3.weight"
    }  # fmt: skip
    assert block.experts[1].w2.weight.shape == (8, 5)


def test_every_family_that_transformers_has_has_its_classes():
    for family, (stem, _) in code.FAMILIES.items():
        if family in transformers.CONFIG_MAPPING:
            for kind in ("Config", "Model", "ForCausalLM"):
                assert hasattr(code, f"Ragged{stem}{kind}"), family
    assert code._classes("no_such_family", "NoSuch", NAMES) == {}
