"""Modules are frozen dataclasses whose every field is declared, and ordinary pytrees."""

import dataclasses
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from moe_jax.transformer import Transformer, abstract, init

CONFIG = ModelConfig(
    vocab_size=32,
    d_model=8,
    num_layers=2,
    max_position=16,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, qk_norm=True),
    moe=MoEConfig(
        num_experts=4, experts_per_token=2, d_expert=6, renormalize=True, d_shared=4,
        shared_gate=True,
    ),
    d_dense=8,
    dense_layers=(1,),
)  # fmt: skip
LINEAR = LinearAttentionConfig(num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=4)
LATENT = LatentAttentionConfig(
    num_heads=2, query_rank=4, kv_rank=6, plain_dim=4, rope_dim=2, value_dim=3
)
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def module_classes() -> list[type]:
    found = set()
    for info in pkgutil.walk_packages(moe_jax.__path__, "moe_jax."):
        for _, value in inspect.getmembers(importlib.import_module(info.name)):
            if inspect.isclass(value) and issubclass(value, nnx.Module):
                found.add(value)
    return sorted((c for c in found if c.__module__.startswith("moe_jax")), key=str)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return init(CONFIG, jax.random.key(0))


def submodules(module):
    yield module
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, nnx.Module):
                yield from submodules(part)


def test_the_models_contain_an_instance_of_every_module_class(model):
    latent = init(CONFIG.replace(attention=LATENT), jax.random.key(0))
    linear = init(CONFIG.replace(linear_attention=LINEAR, linear_layers=(0,)), jax.random.key(0))
    models = (model, latent, linear)
    used = {type(part) for one in models for part in (*submodules(one), one.head)}
    assert used == set(module_classes())


@pytest.mark.parametrize("cls", module_classes(), ids=lambda cls: cls.__name__)
def test_every_field_is_declared_data_or_static(cls):
    assert dataclasses.is_dataclass(cls)
    kinds = {"data": dict(nnx.data().metadata), "static": dict(nnx.static().metadata)}
    assert kinds["data"] != kinds["static"]
    for field in dataclasses.fields(cls):
        assert dict(field.metadata) in kinds.values(), field.name
        assert field.kw_only, field.name


def test_every_instance_is_frozen(model):
    for part in (*submodules(model), model.head):
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)


def test_replace_copies_and_leaves_the_original_alone(model):
    other = dataclasses.replace(model, final_norm=jnp.zeros(8))
    assert (np.asarray(model.final_norm) == 1).all()
    assert other.layers is model.layers or jax.tree.all(
        jax.tree.map(jnp.array_equal, other.layers, model.layers)
    )


def test_leaves_have_the_names_of_the_fields(model):
    paths = jax.tree.flatten_with_path(model)[0]
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths}
    assert {
        "embedding.weight",
        "final_norm",
        "layers.0.attention.q_norm",
        "layers.0.mlp.router",
        "layers.0.mlp.experts.count",
        "layers.0.mlp.experts.w_down",
        "layers.0.mlp.shared.gate",
        "layers.0.mlp.shared.mlp.w_up",
        "layers.1.mlp.w_gate",
    } <= names
    assert not any("config" in name or "width" in name or "norm_eps" in name for name in names)


def test_jit_gives_the_logits_of_the_plain_call(model):
    logits = jax.jit(Transformer.__call__)(model, TOKENS)
    assert logits.shape == (2, 5, 32) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, model(jnp.asarray(TOKENS)), rtol=1e-5, atol=1e-5)


def test_static_fields_are_part_of_the_structure(model):
    experts = model.layers[0].mlp.experts
    other = dataclasses.replace(experts, block=3)
    assert jax.tree.structure(other) != jax.tree.structure(experts)
    assert len(jax.tree.leaves(experts)) == 4


def test_grad_is_a_model_of_gradients(model):
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    gradient = jax.jit(
        jax.grad(lambda model: jnp.square(model(TOKENS)).mean(), allow_int=True)
    )(model)  # fmt: skip
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
    for leaf, slope in zip(jax.tree.leaves(model), jax.tree.leaves(gradient), strict=True):
        assert slope.shape == leaf.shape
        assert not floating(leaf) or np.isfinite(slope).all()
    assert np.abs(gradient.layers[0].mlp.experts.w_down).max() > 0


def test_vmap_runs_a_stack_of_models(model):
    stack = jax.vmap(lambda key: init(CONFIG, key))(jax.random.split(jax.random.key(1), 2))
    assert stack.final_norm.shape == (2, 8)
    logits = jax.jit(jax.vmap(lambda model: model(TOKENS)))(stack)
    for i in range(2):
        alone = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        np.testing.assert_allclose(logits[i], alone(jnp.asarray(TOKENS)), rtol=1e-4, atol=1e-5)


def test_eval_shape_builds_a_model_without_weights(model):
    shapes = jax.eval_shape(lambda key: init(CONFIG, key), jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(model), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    assert jax.eval_shape(Transformer.__call__, shapes, TOKENS).shape == (2, 5, 32)


def test_an_abstract_model_has_the_shapes_and_dtypes_of_a_real_one_and_no_array(model):
    real = init(CONFIG, jax.random.key(0), dtype=jnp.bfloat16)
    found = abstract(CONFIG, dtype=jnp.bfloat16)
    assert jax.tree.structure(found) == jax.tree.structure(real)
    for shape, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(real), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    huge = CONFIG.replace(vocab_size=1 << 20, d_model=1 << 16)  # a quarter of a terabyte, unmade
    assert abstract(huge).embedding.weight.shape == (1 << 20, 1 << 16)


def test_the_face_lists_and_holds_its_names():
    assert set(moe_jax.__all__) == set(dir(moe_jax))
    for name in moe_jax.__all__:
        assert getattr(moe_jax, name).__name__ == name
