"""Models saved as orbax checkpoints come back bit for bit, on one device or on many."""

import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import moe_jax
from moe_jax import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    init,
    restore_model,
    save_model,
)
from moe_jax.config import Activation, LatentAttentionConfig, LinearAttentionConfig
from moe_jax.norm import Centred
from moe_jax.quant import CODED
from moe_jax.quantized import float8_layer, quantize_layer
from moe_jax.sharding import split_over
from moe_jax.structure import CLASSES, describe
from moe_jax.transformer import Head
from tests.support.pools import pooled_experts

ROOT = Path(__file__).parents[2]
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 6)).astype(np.int32)
COUNTS = ((0, 16, 8, 16), (8, 0, 0, 8))  # channels per expert of two layers
ROWS = (48, 30)  # of their pools: split over four devices by rows, and by columns

GROUPED = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    max_position=64,
    norm_eps=1e-6,
    tie_embeddings=False,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True),
    moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=16, renormalize=True),
)
LATENT = GROUPED.replace(
    num_layers=3,
    tie_embeddings=True,
    dense_layers=(0,),
    d_dense=24,
    attention=LatentAttentionConfig(
        num_heads=4, query_rank=16, kv_rank=16, plain_dim=8, rope_dim=4, value_dim=8
    ),
    moe=dataclasses.replace(
        GROUPED.moe, d_shared=16, shared_gate=True, score="sigmoid", correction_bias=True
    ),
)
BIASED = GROUPED.replace(
    sliding_window=4,
    sliding_layers=(1,),
    attention=AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        sinks=True,
        qkv_bias=True,
        rope=RopeConfig(kind="longrope", short_factor=(1.0, 1.5, 2, 0.1), long_factor=(2.0,) * 4),
    ),
    moe=dataclasses.replace(
        GROUPED.moe,
        logit_bias=True,
        expert_bias=True,
        activation=Activation(slope=1.702, shift=1.0, limit=7.0),
    ),
)
HYBRID = GROUPED.replace(
    attention=dataclasses.replace(GROUPED.attention, output_gate=True),
    linear_attention=LinearAttentionConfig(
        num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=8
    ),
    linear_layers=(0,),
    centred_norms=True,
)


def _cut(counts, pool):
    return np.split(np.asarray(pool)[: sum(counts)], np.cumsum(counts)[:-1])


def pruned(config, dtype=jnp.float32, rows=ROWS):
    """A random model whose layers kept `COUNTS` channels, in pools of `rows` rows."""
    model = init(config, jax.random.key(0), dtype=dtype)
    layers = list(model.layers)
    for index, counts, size in zip(config.moe_layers, COUNTS, rows, strict=True):
        experts = layers[index].mlp.experts
        cut = partial(_cut, counts)
        biases = {}
        if config.moe.expert_bias:
            biases = {f"{n}_bias": cut(getattr(experts, f"b_{n}")) for n in ("gate", "up")}
            biases["down_bias"] = experts.b_down
        experts = pooled_experts(
            *(cut(pool) for pool in (experts.w_gate, experts.w_up, experts.w_down)),
            width=16,
            rows=size,
            block=8,
            activation=config.moe.activation,
            **biases,
        )
        alive = experts.count > 0 if config.moe.logit_bias else None
        mlp = dataclasses.replace(layers[index].mlp, experts=experts, alive=alive)
        layers[index] = dataclasses.replace(layers[index], mlp=mlp)
    return dataclasses.replace(model, layers=tuple(layers))


def packed(model, group_size=8):
    layers = tuple(quantize_layer(layer, group_size) for layer in model.layers)
    return dataclasses.replace(model, layers=layers)


def in_8_bits(model):
    layers = tuple(float8_layer(layer) for layer in model.layers)
    return dataclasses.replace(model, layers=layers)


MODELS = {
    "dense": lambda: init(GROUPED, jax.random.key(0)),
    "bfloat16, emptied experts": lambda: pruned(GROUPED, jnp.bfloat16),
    "int4, latent attention, a dense layer, tied": lambda: packed(pruned(LATENT, rows=(48, 32))),
    "biases, sinks, windows, cut experts, another activation": lambda: pruned(BIASED),
    "8-bit floats, a dense layer": lambda: in_8_bits(pruned(GROUPED)),
    "int4, linear attention, centred norms": lambda: packed(pruned(HYBRID, rows=(48, 32))),
}
each_model = pytest.mark.parametrize("name", MODELS)


def leaves(model):
    return [(path, np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(model)]


def assert_same(ours, theirs):
    """The same tree, static fields included, and the same bytes."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, left), (_, right) in zip(leaves(ours), leaves(theirs), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape, path
        assert left.tobytes() == right.tobytes(), path


logits = jax.jit(lambda model, tokens: model(tokens))


@pytest.mark.slow
@each_model
def test_a_model_comes_back_bit_for_bit_and_computes_the_same(name, tmp_path):
    model = MODELS[name]()
    assert save_model(tmp_path / "model", model) == tmp_path / "model"
    found = restore_model(tmp_path / "model")
    assert_same(found, model)
    np.testing.assert_array_equal(logits(found, TOKENS), logits(model, TOKENS))


def test_the_structure_is_json_that_tells_widths_and_quantisation_layer_by_layer(tmp_path):
    save_model(tmp_path / "model", MODELS["int4, latent attention, a dense layer, tied"]())
    text = (tmp_path / "model" / "structure" / "metadata").read_text()
    model = json.loads(text)["model"]
    assert model["config"]["d_model"] == 32 and model["lm_head"] is None
    first, second, third = (layer["mlp"] for layer in model["layers"])
    assert first["class"] == "DenseMLP"
    assert [layer["experts"]["w_gate"]["packed"]["shape"] for layer in (second, third)] == [
        [48, 16],
        [32, 16],
    ]
    assert second["experts"]["block"] == 8
    assert second["experts"]["w_down"] == {
        "class": "QTensor",
        "packed": {"shape": [48, 16], "dtype": "uint8"},
        "scale": {"shape": [6, 32], "dtype": "float32"},
        "group_size": 8,
        "axis": 0,
        "bits": 4,
    }


def test_every_module_and_config_of_the_library_can_be_written_down():
    found = set()
    for info in pkgutil.walk_packages(moe_jax.__path__, "moe_jax."):
        module = importlib.import_module(info.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and (
                issubclass(cls, nnx.Module) or info.name == "moe_jax.config"
            ):
                found.add(cls)
    assert len(found) > 10
    # A Head is made of others' parts.
    assert found - {Head} == set(CLASSES.values()) - {*CODED, Centred}


def test_what_cannot_be_written_down_is_refused_before_anything_is_written(tmp_path):
    model = dataclasses.replace(MODELS["dense"](), final_norm={"a": jnp.ones(32)})
    with pytest.raises(ValueError, match=r"dict.*structure\.CLASSES"):
        save_model(tmp_path / "model", model)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_a_saved_model_is_to_be_overwritten(tmp_path):
    old, new = MODELS["dense"](), pruned(GROUPED)
    save_model(tmp_path / "model", old)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model(tmp_path / "model", new)
    assert_same(restore_model(tmp_path / "model"), old)
    save_model(tmp_path / "model.old", old)  # neighbours that have nothing to do with it
    (tmp_path / "model.new").mkdir()
    save_model(tmp_path / "model", new, overwrite=True)
    assert_same(restore_model(tmp_path / "model"), new)
    assert_same(restore_model(tmp_path / "model.old"), old)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.old", "model.new"}
    (tmp_path / "thesis").mkdir()
    with pytest.raises(FileExistsError, match="thesis"):
        save_model(tmp_path / "thesis", new, overwrite=True)


def test_a_save_that_fails_leaves_the_old_model_and_can_be_repeated(tmp_path):
    good, broken = MODELS["dense"](), pruned(GROUPED)
    save_model(tmp_path / "model", good)
    kept = dataclasses.replace(broken, final_norm=jnp.array(broken.final_norm))
    broken.final_norm.delete()
    for target in ("model", "other"):
        with pytest.raises(RuntimeError, match="deleted"):
            save_model(tmp_path / target, broken, overwrite=True)
    assert_same(restore_model(tmp_path / "model"), good)
    assert not (tmp_path / "other").exists()
    save_model(tmp_path / "other", kept)
    assert_same(restore_model(tmp_path / "other"), kept)


def test_a_model_set_aside_by_a_killed_save_is_named(tmp_path):
    save_model(tmp_path / "model.old-123", MODELS["dense"]())
    with pytest.raises(FileNotFoundError, match=r"rename .*model\.old-123"):
        restore_model(tmp_path / "model")


def test_a_model_saved_before_a_field_with_a_default_existed_still_loads(tmp_path):
    model = MODELS["dense"]()
    save_model(tmp_path / "model", model)
    assert not model.config.centred_norms
    edit(tmp_path / "model", lambda s: s["model"]["config"].pop("centred_norms"))
    assert_same(restore_model(tmp_path / "model"), model)


def test_arrays_go_to_the_default_device_of_the_moment(tmp_path):
    save_model(tmp_path / "model", MODELS["dense"]())
    for chosen in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(chosen):
            found = restore_model(tmp_path / "model")
        assert found.final_norm.devices() == {jax.devices("cpu")[0]}


def edit(folder, change):
    """Change the JSON of a saved model."""
    file = folder / "structure" / "metadata"
    structure = json.loads(file.read_text())
    change(structure)
    file.write_text(json.dumps(structure))


def set_norm(**changes):
    return lambda s: s["model"]["final_norm"].update(changes)


DAMAGE = {
    "cut JSON": (
        lambda f: (f / "structure/metadata").write_text('{"version": 1, "model": {'),
        "structure is damaged",
    ),
    "no JSON": (lambda f: (f / "structure/metadata").unlink(), "structure is damaged"),
    "no structure": (lambda f: shutil.rmtree(f / "structure"), r"lacks structure/.*load_model"),
    "no arrays": (lambda f: shutil.rmtree(f / "arrays"), "lacks arrays/"),
    "no description of the arrays": (
        lambda f: (f / "arrays/_METADATA").unlink(),
        r"arrays is damaged|arrays are not what",
    ),
    "another version": (lambda f: edit(f, lambda s: s.update(version=2)), "version 2 .* version 1"),
    "no model": (lambda f: edit(f, lambda s: s.pop("model")), "KeyError.*model"),
    "a list": (lambda f: edit(f, lambda s: s.update(model=[1])), "describes no Transformer"),
    "unknown class": (
        lambda f: edit(f, lambda s: s["model"]["embedding"].update({"class": "Table"})),
        "unknown class 'Table'; known are Transformer",
    ),
    "missing field": (
        lambda f: edit(f, lambda s: s["model"].pop("config")),
        "Transformer has the fields .* but must have config, embedding",
    ),
    "config that contradicts itself": (
        lambda f: edit(f, lambda s: s["model"]["config"].update(d_model=0)),
        "d_model=0 must be positive",
    ),
    "no shape": (
        lambda f: edit(f, lambda s: s["model"].update(final_norm={})),
        "describes no array",
    ),
    "another shape": (
        lambda f: edit(f, set_norm(shape=[16])),
        r"1 arrays .* final_norm is \('float32', \(32,\)\) instead of \('float32', \(16,\)\)",
    ),
    "another dtype": (lambda f: edit(f, set_norm(dtype="int32")), "instead of .'int32'"),
    "one array too many": (
        lambda f: edit(f, lambda s: s["model"].update(lm_head=None)),
        "lm_head is .* instead of None",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "model", MODELS["dense"]())


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(kind, saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        restore_model(folder)


def test_cut_array_files_are_refused(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    files = [path for path in (folder / "arrays").rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    # Orbax abandons the other reads when one fails; elsewhere, so that their errors end no test.
    program = "import sys, moe_jax; moe_jax.restore_model(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "arrays cannot be read" in done.stderr


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        restore_model(tmp_path / "nowhere")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"hf is no model saved by.*convert\.load_model"):
        restore_model(tmp_path / "hf")


def test_the_split_axis_must_be_one_of_the_mesh():
    with pytest.raises(ValueError, match="axis='expert' is none of the mesh axes model"):
        split_over(Mesh(np.array(jax.devices()[:1]), ("model",)), "expert")


def test_sharding_may_be_a_mesh_one_sharding_or_a_rule(saved):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    single = SingleDeviceSharding(jax.devices()[0])
    by_mesh = restore_model(saved, sharding=mesh)
    assert by_mesh.embedding.weight.sharding == NamedSharding(mesh, PartitionSpec("x", None))
    assert by_mesh.layers[0].attention.w_out.sharding.spec == PartitionSpec(None, "x")
    assert by_mesh.final_norm.sharding.spec == PartitionSpec()
    assert restore_model(saved, sharding=single).final_norm.sharding == single
    seen = {}

    def rule(path, leaf):
        seen[path] = (leaf.shape, leaf.dtype)
        return NamedSharding(mesh, PartitionSpec())

    assert restore_model(saved, sharding=rule).final_norm.sharding.mesh == mesh
    assert seen["layers.1.mlp.experts.w_down"] == ((64, 32), jnp.float32)


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory):
    """A pruned model with an int4 layer, restored over 2 x 4 virtual devices elsewhere."""
    folder = tmp_path_factory.mktemp("sharded")
    model = pruned(GROUPED)
    last = quantize_layer(pruned(GROUPED, rows=(48, 56)).layers[1], 8)
    model = dataclasses.replace(model, layers=(*model.layers, last))
    model = dataclasses.replace(model, config=GROUPED.replace(num_layers=3))
    save_model(folder / "model", model)
    np.save(folder / "tokens.npy", TOKENS)
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.support.sharded", str(folder)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300)
    return model, folder


@pytest.mark.slow
def test_restored_over_devices_each_holds_its_part_and_no_more(on_eight_devices):
    model, folder = on_eight_devices
    placed = json.loads((folder / "placed.json").read_text())
    assert placed.keys() == {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves(model)
    }
    assert all(len(devices) == 8 for devices in placed.values())
    expected = {  # path -> part of each of four devices, and the axis along which they follow
        "embedding.weight": ([16, 32], 0),
        "layers.0.attention.w_q": ([8, 32], 0),
        "layers.0.attention.w_out": ([32, 8], 1),
        "layers.0.mlp.experts.w_gate": ([12, 32], 0),
        "layers.0.mlp.experts.w_down": ([12, 32], 0),
        "layers.1.mlp.experts.w_down": ([30, 8], 1),  # four devices do not divide 30 rows
        "layers.2.mlp.experts.w_up.packed": ([14, 16], 0),
        "layers.2.mlp.experts.w_down.scale": ([7, 8], 1),  # nor 56 / 8 groups
        "final_norm": ([32], None),
    }
    for path, (shape, axis) in expected.items():
        for device in range(8):
            start = [0] * len(shape)
            if axis is not None:
                start[axis] = device % 4 * shape[axis]
            assert placed[path][str(device)] == [shape, start], (path, device)
    whole = {
        path
        for path, devices in placed.items()
        if len(devices["0"][0]) == 2 and len({json.dumps(d) for d in devices.values()}) == 1
    }
    assert not whole  # every matrix is split


def test_restored_over_devices_the_logits_are_those_of_one_device(on_eight_devices):
    model, folder = on_eight_devices
    ours, theirs = np.load(folder / "logits.npy"), np.asarray(logits(model, TOKENS))
    assert np.abs(theirs).max() > 0.01
    # float32 sums of up to 48 terms of size 0.1, in parts
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-5)


def test_saved_from_eight_devices_one_device_restores_it_bit_for_bit(on_eight_devices):
    model, folder = on_eight_devices
    found = restore_model(folder / "again")
    assert_same(found, model)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(found))


def test_the_json_round_trip_keeps_numbers_exactly():
    odd = dataclasses.replace(GROUPED, norm_eps=1 / 3)
    assert json.loads(json.dumps(describe(odd)))["norm_eps"] == 1 / 3
