"""Folders as they are published: leftovers, other names, and errors whose cure cures."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import CheckpointError, find_family, load_model, open_checkpoint, save_pretrained
from convert.reader import MOST_LINES
from moe_jax.errors import InputError
from tests.support import tiny
from tests.support.logits import logits

TOKENS = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)
# Families whose experts transformers 5 holds in one tensor per layer: all but gpt-oss, whose own
# names are these.
FUSED = ["qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3",
         "glm4_moe", "glm4_moe_lite", "dots1", "gpt_oss"]  # fmt: skip


def change(folder, tensors=(), **config):
    """Put tensors into a folder, None takes one out, and values into its config.json."""
    path = folder / "model.safetensors"
    found = load_file(path) | dict(tensors)
    save_file({k: v for k, v in found.items() if v is not None}, path, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def equal(found, wanted):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def torch_logits(folder):
    model, _ = tiny.load_export(folder, trust=False)
    return tiny.torch_logits(model, TOKENS, np.ones(TOKENS.shape, bool))


def test_rotary_frequencies_that_a_file_holds_are_left_out_and_named(tmp_path, caplog):
    """Kimi-K2 and Moonlight are published with them."""
    folder = tiny.save(tiny.tiny_model("deepseek_v3"), tmp_path / "kimi")
    before = load_model(folder)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    frequencies = {name.format(i): torch.rand(4) for i in range(2)}
    change(folder, frequencies, model_type="kimi_k2")
    after = open_checkpoint(folder)
    assert equal(load_model(folder), before)
    assert f"left out 2 tensor(s) such as {name.format(0)}" in caplog.text
    exported = save_pretrained(load_model(folder), after, tmp_path / "out", "padded-bf16")
    assert not any("inv_freq" in key for key in load_file(exported / "model.safetensors"))


@pytest.mark.parametrize("family", FUSED)
def test_the_names_that_transformers_5_has_in_memory_are_read(family, tmp_path):
    model = tiny.tiny_model(family)
    public = tiny.save(model, tmp_path / "public")
    fused = tiny.save(model, tmp_path / "fused", save_original_format=False)
    names = load_file(fused / "model.safetensors").keys()
    assert any(name.endswith(".experts.gate_up_proj") for name in names)
    assert not any(re.search(r"experts\.\d", name) for name in names)
    assert equal(load_model(fused), load_model(public))


def test_a_tensor_under_two_names_is_refused(tmp_path):
    folder = tiny.save(tiny.tiny_model("mixtral"), tmp_path / "model")
    change(folder, {"model.layers.0.mlp.gate.weight": torch.zeros(8, 32)})
    with pytest.raises(CheckpointError, match=r"block_sparse_moe\.gate\.weight is stored twice"):
        open_checkpoint(folder)


@pytest.fixture
def tied(tmp_path):
    return tiny.tiny_qwen3_moe(tmp_path / "model", tie_word_embeddings=True)


def test_a_stored_head_that_is_the_embedding_is_tied(tied):
    before = load_model(tied)
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    change(tied, {"lm_head.weight": embedding.clone()})
    after = load_model(tied)
    assert after.config.tie_embeddings and equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_head_that_is_not_the_embedding_is_the_head(tied, tmp_path, caplog, dtype):
    """As transformers 5 has it; an export says so in its config.json."""
    before = torch_logits(tied)
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(96, 32, generator=generator).to(dtype)
    change(tied, {"lm_head.weight": head})
    base = open_checkpoint(tied)
    assert not base.config.tie_embeddings
    assert "lm_head.weight is not the embedding, so it is the head" in caplog.text
    found, wanted = logits(base, TOKENS), torch_logits(tied)
    assert np.abs(wanted - before).max() > 0.5
    np.testing.assert_allclose(found, wanted, atol=5e-5, rtol=1e-5)
    half = open_checkpoint(tied, dtype=jnp.bfloat16)
    folder = save_pretrained(half, half, tmp_path / "out", "padded-bf16")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(torch_logits(folder), logits(half, TOKENS), atol=5e-5, rtol=1e-5)


def test_a_missing_head_is_refused_and_its_cure_cures(tied):
    before = load_model(tied)
    change(tied, tie_word_embeddings=False)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tied)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "lm_head.weight is missing; if the model shares it with the embedding"
    )
    assert "set tie_word_embeddings to true in config.json" in problem
    assert equal(load_model(change(tied, tie_word_embeddings=True)), before)


@pytest.mark.parametrize(
    ("family", "said", "fitting"),
    [
        ("qwen2_moe", "qwen3_mo", ["qwen2_moe"]),  # unknown, spelt like another
        ("olmoe", "my_model", ["olmoe"]),
        ("dots1", "llama", ["dots1"]),
        ("qwen3_moe", "olmoe", ["qwen3_moe"]),  # known, but not what the tensors are
    ],
)
def test_a_hint_comes_from_tensors_and_its_cure_cures(family, said, fitting, tmp_path):
    folder = tiny.save(tiny.tiny_model(family), tmp_path / "model")
    before = load_model(folder)
    change(folder, model_type=said)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert "ragged_" not in text
    hint = re.search(r"tensors and sizes are those of a (.*?): .* set model_type to that", text)
    assert hint and re.findall(r"'(\w+)'", hint[1]) == fitting
    assert equal(load_model(change(folder, model_type=fitting[0])), before)


def test_known_families_are_named_without_those_of_our_exports():
    with pytest.raises(InputError, match="model_type='x' is unknown; known are: qwen2_moe,") as e:
        find_family("x")
    assert "ragged_" not in str(e.value)


def test_the_cause_is_named_first_and_of_many_problems_one_of_each_kind(tmp_path):
    model = tiny.tiny_model("qwen2_moe", num_experts=32, num_hidden_layers=3)
    folder = tiny.save(model, tmp_path / "model", max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards[len(shards) // 2 :]:
        shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    first, *lines = str(caught.value).splitlines()
    assert len(caught.value.problems) > 2 * MOST_LINES >= 2 * len(lines)
    assert first == f"{folder}: {len(caught.value.problems)} problem(s)"
    lost = len(shards) - len(shards) // 2
    assert re.fullmatch(
        rf"  - shard model-\d+-of-\d+.safetensors is missing; download it again \(and {lost - 1} "
        r"more like it\)",
        lines[0],
    )
    kinds = [re.sub(r"\d+", "N", line.partition(" (and")[0]) for line in lines]
    assert len(set(kinds)) == len(kinds)
    assert "  - model.layers.N.mlp.experts.N.up_proj.weight is missing" in kinds
    more = sum(int(found[1]) for found in map(re.compile(r"and (\d+) more").search, lines) if found)
    assert more + len(lines) == len(caught.value.problems)


def test_a_quantisation_that_is_not_read_is_named_before_all_that_follows_from_it(tmp_path):
    folder = tiny.tiny_qwen2_moe(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    codes = {k[: -len("weight")] + "qweight": torch.zeros(4, 4, dtype=torch.int32)
             for k in tensors if "experts" in k}  # fmt: skip
    gone = dict.fromkeys(k for k in tensors if "experts" in k)
    change(folder, codes | gone, quantization_config={"quant_method": "hqq", "bits": 4})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "hqq" in caught.value.problems[0]
    assert "hqq" in str(caught.value).splitlines()[1]


def test_a_stale_index_is_refused_and_its_cure_cures(tmp_path):
    folder = tiny.tiny_qwen2_moe(tmp_path / "model")
    before = load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="remove the one that is stale"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert equal(load_model(folder), before)


def test_a_missing_shard_is_refused_and_its_cure_cures(tmp_path):
    folder = tiny.save(tiny.tiny_model("qwen2_moe"), tmp_path / "model", max_shard_size="40KB")
    before, shard = load_model(folder), sorted(folder.glob("model-*.safetensors"))[1]
    shutil.move(shard, tmp_path / "lost")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert caught.value.problems[0] == f"shard {shard.name} is missing; download it again"
    shutil.move(tmp_path / "lost", shard)
    assert equal(load_model(folder), before)
