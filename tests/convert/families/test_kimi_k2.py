"""Kimi-K2 folders are read as they are published and exported as the DeepSeek-V3 they compute."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from convert import open_checkpoint
from convert.export import Export
from convert.export_format import ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.shrink.prune import PrunedSource
from tests.support import tiny
from tests.support.logits import logits

TOKENS = np.random.default_rng(2).integers(0, 96, (2, 9)).astype(np.int32)
# Kimi-K2's own: one group of experts, and a YaRN ramp without any width.
YARN = {"type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights under Kimi-K2's name and under DeepSeek-V3's."""
    root = tmp_path_factory.mktemp("kimi")
    model = tiny.tiny_model("deepseek_v3", num_hidden_layers=2, n_group=1, topk_group=1)
    stock = tiny.save(model, root / "stock")
    config = json.loads((stock / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_scaling": YARN, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
               "topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # fmt: skip
    (stock / "config.json").write_text(json.dumps(config))
    kimi = root / "kimi"
    shutil.copytree(stock, kimi)
    remote = {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
              "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}  # fmt: skip
    own = config | {"model_type": "kimi_k2", "auto_map": remote}
    (kimi / "config.json").write_text(json.dumps(own))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    (kimi / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (kimi / "tokenization_kimi.py").write_text("# the tokenizer's own code\n")
    return kimi, stock


def torch_logits(folder, **options) -> np.ndarray:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        **options,
    )
    assert not any(info.values()), info
    return tiny.torch_logits(model.eval(), TOKENS, np.ones(TOKENS.shape, bool))


def test_logits_equal_those_of_the_stock_model_with_the_same_weights(folders):
    kimi, stock = folders
    source = open_checkpoint(kimi)
    assert source.about.family.model_type == "kimi_k2"
    wanted = torch_logits(stock)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(logits(source, TOKENS), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["padded-bf16", "layered-bf16", "ragged-bf16"])
def test_an_export_is_a_deepseek_v3_that_computes_the_pruned_model(folders, tmp_path, name):
    source = open_checkpoint(folders[0], dtype=jnp.bfloat16)
    moe, layers = source.config.moe, source.config.moe_layers
    keep = np.zeros((len(layers), moe.num_experts, moe.d_expert), bool)
    keep[:, :, ::2] = True
    kept = (moe.d_expert // 2,) * moe.num_experts
    widths = tuple(kept if i in layers else () for i in range(len(source)))
    pruned = PrunedSource(source, PruningPlan(keep, layers, {"model_hash": source.fingerprint}))
    form = ExportFormat(name, 32)
    folder = Export(source.about, widths, form).write(pruned, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("" if form.is_padded else "ragged_") + "deepseek_v3"
    assert "kimi" not in json.dumps(config) and "configuration_deepseek" not in json.dumps(config)
    for file in ("tokenizer_config.json", "tokenization_kimi.py"):  # one is useless without both
        assert (folder / file).read_bytes() == (folders[0] / file).read_bytes()
    wanted = logits(open_checkpoint(folder, dtype=jnp.float32), TOKENS)
    found = torch_logits(folder, trust_remote_code=not form.is_padded)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    near = logits(pruned, TOKENS)  # bfloat16 weights in either, activations in float32
    np.testing.assert_allclose(near, wanted, atol=1e-5)
