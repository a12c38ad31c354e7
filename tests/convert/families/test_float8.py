"""Every family's export in 8-bit floats computes the rounded model, here and in transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.torch import load_file

from convert import open_checkpoint
from convert.export import Export
from convert.export_format import FLOAT8, ExportFormat
from convert.families import find_family
from pruning.budget.plan import PruningPlan
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from pruning.stages.sizes import kept_widths
from tests.support import float8, tiny
from tests.support.logits import logits
from tests.support.variants import EXPORTED

TOKENS = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)
SIZES = {"hidden_size": 128, "num_experts_per_tok": 2}
WIDTH = {"mixtral": "intermediate_size", "olmoe": "intermediate_size"}


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in EXPORTED if FLOAT8 in find_family(f).formats])
def test_the_pruned_model_in_8_bits_is_the_same_everywhere(family, tmp_path):
    sizes = EXPORTED[family] | SIZES | {WIDTH.get(family, "moe_intermediate_size"): 256}
    model = tiny.save(tiny.half(tiny.tiny_model(family, **sizes)), tmp_path / "model")
    base = open_checkpoint(model, dtype=jnp.bfloat16)
    keep = np.zeros((len(base.config.moe_layers), base.config.moe.num_experts, 256), bool)
    rng = np.random.default_rng(0)
    for place in np.ndindex(keep.shape[:2]):  # some experts with one block, others with none
        keep[place][rng.permutation(256)[: 128 * (sum(place) % 3 > 0)]] = True
    plan = PruningPlan(keep, base.config.moe_layers, {"model_hash": base.fingerprint})
    source = QuantizedSource(PrunedSource(base, plan), 32, "fp8")
    export = Export(base.about, kept_widths(plan, base.about), ExportFormat(FLOAT8))
    folder = export.write(source, tmp_path / "out")
    assert export.nbytes == sum(f.stat().st_size for f in folder.glob("*.safetensors*"))

    stored = load_file(folder / "model.safetensors")
    coded = [name for name in stored if name + "_scale_inv" in stored]
    assert sum("experts." in name for name in coded) >= 3 * keep.shape[0] * keep.shape[1]
    assert any("self_attn" in name for name in coded)
    index, expert = plan.layer_indices[0], int(np.flatnonzero(plan.counts[0])[0])
    ends = (f"experts.{expert}.down_proj.weight", f"experts.{expert}.w2.weight")
    name = next(n for n in coded if f".layers.{index}." in n and n.endswith(ends))
    before = load_file(model / "model.safetensors")[name].float().numpy()[:, keep[0, expert]]
    scale = stored[name + "_scale_inv"]
    np.testing.assert_array_equal(scale, float8.largest(before) / np.float32(448))
    assert float8.is_nearest(stored[name], scale.numpy(), before)

    wanted = logits(source, TOKENS)
    atol = 2e-5 * np.abs(wanted).max()
    found = logits(open_checkpoint(folder, dtype=jnp.float32), TOKENS)
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=0)
    assert np.abs(wanted - logits(PrunedSource(base, plan), TOKENS)).max() > 1e-4  # it is rounded
    exact = transformers.FineGrainedFP8Config(dequantize=True)
    loaded, info = tiny.load_export(folder, trust=False, quantization_config=exact)
    assert not any(info.values()), info
    theirs = tiny.torch_logits(loaded, TOKENS, np.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(theirs, wanted, atol=atol, rtol=0)
