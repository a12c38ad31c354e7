"""Sizes known beforehand, against every plan of a small model and against counts by hand.

The model is a config.json: two layers of two experts with three blocks of channels each, and a
dense layer between them.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.checkpoint import load_model, open_checkpoint
from convert.description import describe
from convert.export import Export
from convert.export_format import ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import Allowance, allowing
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.stages import preflight, scoring_sizes, size_bounds, sizes
from pruning.stages.export import export
from pruning.stages.job import resolved
from pruning.stages.repair import repair_bytes
from pruning.text.windows import Windows
from tests.support.synthetic import statistics

D, F, BLOCK = 64, 96, 32
CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 100, "hidden_size": D, "intermediate_size": 64,
    "moe_intermediate_size": F, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1,
    "mlp_only_layers": [1], "decoder_sparse_step": 1, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}  # fmt: skip
OUTER = 2 * 100 * D + D  # embedding, head and norm
ATTENTION = D * 64 * 2 + D * 32 * 2 + 2 * 16 + 2 * D  # with norms of heads and of the layer
LAYERS = {"experts": 3 * D * F, "router": 2 * D, "dense": 3 * D * 64}
WEIGHTS = OUTER + 3 * ATTENTION + LAYERS["dense"] + 2 * LAYERS["router"] + 4 * LAYERS["experts"]
FORMS = ("ragged-bf16", "ragged-int4", "layered-bf16", "layered-int4", "padded-bf16", "padded-int4")


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    def make(**changes):
        folder = tmp_path_factory.mktemp("bare")
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        return describe(folder)

    return make


@pytest.fixture(scope="module")
def base(described):
    return described()


def recipe(base, *names: str, **changes):
    bits = 4 if any("int4" in name for name in names) else 16
    whole = {"model": "m", "output": "o", "export": names, "group_size": 32, "bits": bits,
             "emptied": "zero"}  # fmt: skip
    return resolved(CompressionRecipe(**{**whole, **changes}), base)


def every_plan(width: str):
    """Widths of all plans of a width policy in which every token finds an expert."""
    for blocks in itertools.product(range(4), repeat=4):
        first, last = blocks[:2], blocks[2:]
        alike = {"free": True, "layer": first[0] == first[1] and last[0] == last[1],
                 "uniform": len(set(blocks)) == 1}  # fmt: skip
        if any(first) and any(last) and alike[width]:
            yield tuple(BLOCK * b for b in first), (), tuple(BLOCK * b for b in last)


@pytest.mark.parametrize("width", ["free", "layer", "uniform"])
@pytest.mark.parametrize("name", FORMS)
def test_the_range_of_an_export_is_that_of_all_plans(base, name, width):
    options, form = recipe(base, name, width=width), ExportFormat(name, 32)
    found: dict[int, list[tuple[int, int]]] = {}
    for widths in every_plan(width):
        size, widest = Export(base, widths, form).nbytes, max(map(max, filter(None, widths)))
        found.setdefault(sum(map(sum, widths)), []).append((size, widest))
    for channels, plans in found.items():
        fewest, most = size_bounds.byte_range(base, options, name, channels)
        # Headers are padded to eight bytes, and bounded by the digits of the widest numbers.
        assert 0 <= min(plans)[0] - fewest <= 16 and most >= max(plans)[0]
        # A padded folder's bound asks for a whole expert, whether or not channels are left for it.
        if not name.startswith("padded") or width == "uniform" or max(w for _, w in plans) == F:
            assert most - max(plans)[0] <= 24
    for rate in (0, 1 / 3):
        plans = [one for channels, some in found.items() if channels <= (1 - rate) * 4 * F
                 for one in some]  # fmt: skip
        bound = size_bounds.most_bytes(base, recipe(base, name, width=width, prune_rate=rate), name)
        assert 0 <= bound - max(plans)[0] <= 48
    most = size_bounds.most_bytes(base, recipe(base, name, width=width, prune_rate=0.0), name)
    other = "padded-bf16" if name == "ragged-bf16" else "ragged-bf16"
    for target in (100_000, 10**6):
        options = recipe(base, name, other, width=width, target_bytes=target)
        assert size_bounds.most_bytes(base, options, name) == min(most, target)
        assert size_bounds.most_bytes(base, options, other) > 200_000


def test_widths_of_the_whole_model_have_none_for_dense_layers(base):
    keep = np.zeros((2, 2, F), bool)
    keep[0, 0, :5] = keep[0, 1, :7] = keep[1, 1, 3:] = True
    plan = PruningPlan(keep, (0, 2), {})
    assert sizes.kept_widths(plan, base) == ((5, 7), (), (0, F - 3))
    options = recipe(base, "ragged-bf16", "padded-bf16")
    wanted = {}
    for name in ("ragged-bf16", "padded-bf16"):
        ragged, padded = (
            Export(base, ((5, 7), (), (0, F - 3)), ExportFormat(form))
            for form in (name, "padded-bf16")
        )
        kept = WEIGHTS - 4 * LAYERS["experts"] + 3 * D * (5 + 7 + F - 3)
        assert ragged.parameters == kept
        wanted[name] = {"bytes": ragged.nbytes, "parameters": kept, "padded_bytes": padded.nbytes}
    assert sizes.export_sizes(base, plan, options) == wanted


def test_a_form_has_constants_where_the_plan_has_or_may_have_them(base):
    keep = np.ones((2, 2, F), bool)
    keep[1, 0] = False
    plan = PruningPlan(keep, (0, 2), {})
    means = (np.zeros((0, D), np.float32), np.zeros((1, D), np.float32))
    with_means = PruningPlan(keep, (0, 2), {}, constants=means)
    for emptied in ("mean", "zero"):
        options = recipe(base, "ragged-bf16", emptied=emptied)
        assert sizes.form_of(options, "ragged-bf16").constants == (emptied == "mean")
        assert not sizes.form_of(options, "ragged-bf16", plan).constants
        assert sizes.form_of(options, "ragged-bf16", with_means).constants
    stored = CompressionRecipe(model="m", output="o", mtp="keep", requantize=True)
    assert sizes.form_of(stored, "ragged-int4") == ExportFormat(
        "ragged-int4", 32, mtp="keep", requantize=True
    )
    # What a means' tensor and its entries take is bounded from above.
    plain, more = (
        size_bounds.most_bytes(base, recipe(base, "ragged-bf16", emptied=e), "ragged-bf16")
        for e in ("zero", "mean")
    )
    assert more - plain == 2 * (2 - 1) * (2 * D + 256)


def test_a_sample_is_read_from_the_larger_of_the_whole_model_and_the_export(described, monkeypatch):
    base = described()
    assert base.weights() == WEIGHTS
    whole = ((F, F), (), (F, F))

    def read(base, name, widths=whole):
        return sizes.sample_memory(base, Export(base, widths, ExportFormat(name, 32)))

    def with_a_layer(size, vocabulary=100):
        return size + size // 3 + 4 * vocabulary * D  # and the head as float32

    few = ((8, 0), (), (8, 0))
    kept = WEIGHTS - 3 * D * (4 * F - 16)
    assert read(base, "ragged-bf16", few) == with_a_layer(2 * WEIGHTS)
    # What has 4 bits comes as float32; router, norms, embedding and head have 16.
    narrow = OUTER + 3 * (2 * 16 + 2 * D) + 2 * LAYERS["router"]
    packed = 4 * (WEIGHTS - narrow) + 2 * narrow
    assert read(base, "ragged-int4") == with_a_layer(packed)
    assert 4 * kept < 2 * WEIGHTS
    assert read(base, "ragged-int4", few) == with_a_layer(2 * WEIGHTS)
    # A layer that keeps all has 2 F rows, and those of a step of the products more; so then have
    # others. Steps are of 32: 7 of these (and 3 channels) are less than 3 of 96, 5 of 64, 13 of 16.
    uneven, rows = ((F, F), (), (8, 0)), 2 * (2 * F + 32)
    assert read(base, "ragged-int4", uneven) == with_a_layer(packed + 4 * 3 * D * (rows - 4 * F))
    assert read(base, "ragged-bf16", uneven) == with_a_layer(2 * (WEIGHTS + 3 * D * (rows - 4 * F)))
    for wide in ({"dtype": "float32"}, {"torch_dtype": "float32"}):
        assert read(described(**wide), "ragged-bf16", few) == with_a_layer(4 * WEIGHTS)
    # 4 GiB of 16-bit weights are still read, and more are not.
    room = (1 << 31) - WEIGHTS
    at_most = described(vocab_size=100 + room // (2 * D))
    assert 0 < 2 * at_most.weights() <= 4 << 30 < 2 * (at_most.weights() + 2 * D)
    assert read(at_most, "ragged-bf16") == with_a_layer(
        2 * at_most.weights(), at_most.config.vocab_size
    )
    assert read(described(vocab_size=101 + room // (2 * D)), "ragged-bf16") == 0
    monkeypatch.setattr(sizes, "SAMPLE_BYTES", 2 * WEIGHTS)
    assert read(base, "ragged-bf16") == with_a_layer(2 * WEIGHTS)


@pytest.mark.parametrize("tied", [False, True])
def test_active_parameters_are_what_a_token_meets_on_average(described, tied):
    base = described(tie_word_embeddings=tied)
    counts = np.array([[3, 96], [0, 50]])
    sums = statistics(2, 2, F, D=D)
    always = WEIGHTS - 4 * LAYERS["experts"] - 100 * D  # one of embedding and head, or the one
    sums = sums.replace(tokens=np.array([[30.0, 10.0], [4.0, 36.0]]),
                        total_tokens=np.array(40.0))  # fmt: skip
    met = 3 * D * (3 * 0.75 + 96 * 0.25 + 0 * 0.1 + 50 * 0.9)
    assert sizes.active_parameters(base, counts, sizes.token_shares(base, sums)) == always + round(
        met
    )
    blank = sums.replace(tokens=0 * sums.tokens, total_tokens=np.array(0.0))
    even = 3 * D * (3 + 96 + 50) / 2
    assert sizes.active_parameters(base, counts, sizes.token_shares(base, blank)) == always + round(
        even
    )


def test_scratch_holds_the_states_of_the_text_that_takes_most(base, monkeypatch):
    monkeypatch.setattr(scoring_sizes.states, "MEMORY_STATES", 0)
    window, batch = 24, 5

    def found(windows, **groups):
        whole: dict = {"batch": batch, "window": window, "dtype": "bfloat16", **groups}
        return scoring_sizes.scratch_bytes(base, recipe(base, "ragged-bf16", **whole), windows)

    def states(windows, copies=1):
        # before and in the middle of three layers, in batches of five
        return 2 * 3 * copies * math.ceil(windows / batch) * batch * window * D * 2

    def swept(windows, slots):
        # four parts or more, of 64 windows at most, each in even batches of five at most
        count = min(windows, max(4, math.ceil(windows / 64)))
        parts = [len(range(start, windows, count)) for start in range(count)]
        rows = math.ceil(max(parts) / math.ceil(max(parts) / batch))
        return slots * sum(math.ceil(part / rows) * rows for part in parts) * window * D * 2

    assert found(0) == 0
    for windows in (1, 7, 10, 64, 65, 200, 300):
        plain, gradients = swept(windows, 2), swept(windows, 2 + 2 * 3)
        assert found(windows) == plain and found(windows, gradients=True) == gradients
        assert found(windows, weight_gradients=True) == max(plain, states(windows))
        assert found(windows, nll_ig=20) == max(plain, states(min(windows, 64 // 20), 20))
        assert found(windows, nll_ig=3, gradients=True) == max(
            states(min(windows, 21), 3), gradients
        )
    monkeypatch.undo()  # only what a killed sweep goes on from is never in memory
    assert found(200, weight_gradients=True) == swept(200, 2)


def test_a_repair_keeps_two_matrices_a_layer_and_the_states_of_two_models(base):
    whole = {"window": 24, "batch": 5, "dtype": "bfloat16", "prune_rate": 2 / 3}

    def found(windows, **changes):
        return repair_bytes(base, recipe(base, "ragged-bf16", **whole | changes), windows)

    # Of four experts a third of the channels, in 16 bits; before and after of each text, with
    # whole batches of what is learnt from and of what is held out.
    states = 2 * 2 * (11 + 2 * 4) * 24 * D * 2
    assert found(11, repair="expert") == found(11, repair="layer") == 2 * 4 * 32 * D + states
    assert found(11, repair="none") == 0
    least = found(3, repair="layer")
    assert least == 2 * 4 * 32 * D + 2 * 2 * (3 + 2 * 4) * 24 * D * 2
    assert found(2, repair="layer") == 0  # too few for two halves and one held out


def test_gptq_keeps_the_codes_of_the_smallest_packed_export_and_two_states(base):
    names = {"ragged-int4": 5000, "padded-int4": 7000, "ragged-bf16": 100}
    whole = {"quantizer": "gptq", "window": 24, "batch": 5, "dtype": "bfloat16"}
    options = recipe(base, *names, bits=4, **whole)
    states = 2 * (11 + 2 * 4) * 24 * D * 2
    assert sizes.gptq_bytes(base, options, 11, names) == 5000 + states
    assert sizes.gptq_bytes(base, options, 11, {"ragged-bf16": 100}) == 0
    plain = recipe(base, *names, **(whole | {"quantizer": "rtn", "bits": 4}))
    assert sizes.gptq_bytes(base, plain, 11, names) == 0
    stored = CompressionRecipe(model="m", output="o", quantizer="gptq", batch=5, dtype="float32")
    assert sizes.gptq_bytes(base, stored, 1, {"ragged-int4": 7}) == 7 + 2 * 9 * 2048 * D * 4


def test_the_mean_width_is_in_whole_blocks_or_whole_experts(base):
    def mean(rate, rounding=math.ceil, **changes):
        options = recipe(base, "ragged-bf16", prune_rate=rate, **changes)
        return size_bounds.mean_width(base, options, rounding)

    assert [mean(rate, block=8) for rate in (0.0, 0.5, 0.55, 0.9, 0.99)] == [96, 48, 48, 16, 8]
    assert [mean(rate, math.floor, block=8) for rate in (0.55, 0.9, 0.99)] == [40, 8, 8]
    # Of four experts as many whole ones as come nearest.
    assert [mean(rate, block=8, width="experts") for rate in (0.3, 0.45, 0.7)] == [72, 48, 24]
    assert mean(None, target_bytes=10**6, block=8) == 96


def test_a_format_fills_widths_up_where_it_has_one_for_several_experts(base):
    pads = {
        (width, name): size_bounds.pads(
            recipe(base, name, width=width, cap=64 if width == "capped" else None),
            ExportFormat(name),
        )
        for width in ("free", "capped", "layer", "uniform")
        for name in ("ragged-bf16", "layered-bf16", "padded-bf16")
    }
    assert {key for key, fills in pads.items() if fills} == {
        ("free", "layered-bf16"), ("capped", "layered-bf16"),
        ("free", "padded-bf16"), ("capped", "padded-bf16"), ("layer", "padded-bf16"),
    }  # fmt: skip


def test_bytes_of_a_folder_are_those_of_weights_and_their_index(tmp_path):
    for name, size in {"a.safetensors": 5, "b.safetensors": 7, "x.safetensors.index.json": 11,
                       "config.json": 1000, "safetensors.txt": 9}.items():  # fmt: skip
        (tmp_path / name).write_bytes(b"x" * size)
    assert sizes.folder_bytes(tmp_path) == sizes.folder_bytes(Path(tmp_path)) == 23


def test_shared_experts_fill_a_padded_folder_up_at_some_widths(tmp_path):
    """DeepSeek's shared experts are stored as a whole number of an expert's width."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "deepseek_v2", "vocab_size": 100, "hidden_size": D, "intermediate_size": 80,
        "moe_intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_routed_experts": 2, "n_shared_experts": 2,
        "num_experts_per_tok": 1, "first_k_dense_replace": 0, "kv_lora_rank": 24,
        "q_lora_rank": None, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "max_position_embeddings": 64, "torch_dtype": "bfloat16",
    }))  # fmt: skip
    base = describe(tmp_path)
    options = recipe(base, "padded-bf16", width="free", block=8)
    form = ExportFormat("padded-bf16")
    by_width = {w: Export(base, ((w, w),) * 2, form).nbytes for w in range(8, F + 1, 8)}
    assert list(by_width.values()) != sorted(by_width.values())
    for channels in (32, 160, 200, 264):
        possible = [size for w, size in by_width.items() if 4 * w >= channels]
        assert size_bounds.byte_range(base, options, "padded-bf16", channels) == (
            min(possible), max(possible),
        )  # fmt: skip
    free = recipe(base, "padded-bf16", width="free", block=8)
    most = size_bounds.most_bytes(base, free, "padded-bf16")
    assert 0 <= most - max(by_width.values()) <= 16


@pytest.mark.parametrize("name", ["ragged-bf16", "ragged-int4"])
def test_an_export_in_memory_takes_what_a_sample_was_said_to_take(name, models, tmp_path):
    """A plan of unequal layers, of which the first stays whole, read like any other model."""
    base, form = open_checkpoint(models / "single", dtype=jnp.bfloat16), ExportFormat(name, 32)
    c = base.config
    keep = np.ones((len(c.moe_layers), c.moe.num_experts, c.moe.d_expert), bool)
    keep[1, 0, 32:] = False
    plan = PruningPlan(keep, c.moe_layers, {"model_hash": base.fingerprint})
    folder = export(base, plan, form, tmp_path / name, Steps(quiet=True))
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(load_model(folder))}.values()
    held = sum(leaf.nbytes for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    said = sizes.sample_memory(base.about, sizes.export_of(base.about, plan, form))
    larger = max(held, 4 * base.about.weights())  # the dense model is stored as float32
    assert said == larger + larger // len(base) + 4 * c.vocab_size * c.d_model
    assert name != "ragged-int4" or held > 4 * base.about.weights()


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_that_meets_every_expert_meets_all_but_its_own_row_of_the_embedding(
    described, tied
):
    """With biases, of which that of an expert's output is no channel's."""
    base = described(
        model_type="gpt_oss", num_local_experts=2, tie_word_embeddings=tied, sliding_window=8,
        layer_types=["full_attention"] * 3, rope_theta=1e4, rope_scaling=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    c = base.config
    shape = (len(c.moe_layers), c.moe.num_experts)
    assert c.moe.expert_bias
    counts, wide = np.full(shape, c.moe.d_expert), (*shape, c.moe.d_expert)
    every = sizes.token_shares(base, statistics(*wide, tokens=np.full(shape, 100.0)))  # of 100
    looked_up = 0 if tied else c.vocab_size * c.d_model
    assert sizes.active_parameters(base, counts, every) == base.weights() - looked_up
    none = np.zeros(shape)
    # Gate, up and down of each channel with its two biases, and the bias of the output.
    experts = counts.size * (c.moe.d_expert * (3 * c.d_model + 2) + c.d_model)
    wanted = base.weights() - looked_up - experts
    assert sizes.active_parameters(base, counts, none) == wanted


def test_scratch_files_of_layers_in_groups_are_counted_and_said(base, tmp_path, monkeypatch):
    whole = {"window": 24, "batch": 5, "dtype": "bfloat16", "bits": 4, "quantizer": "gptq"}
    options = recipe(base, "ragged-int4", **whole, repair="layer", output=str(tmp_path))
    # 11 windows, 1 of them held out, each of the two filled up to whole batches; of 2 experts.
    windows, rows = 11 + 2 * 4, 2 * F * D
    repair = 3 * 4 * windows * 24 * D + 4 * (rows + 2 * D) + 2 * 2 * rows
    codes = 2 * 4 * (windows + 2 * (1 + 4)) * 24 * D + 3 * (rows // 2 + 4 * rows // 32)
    assert preflight.between_files(base, options, 11) == 0  # whole layers
    with allowing(Allowance(experts=1)):  # as little lies in memory
        assert preflight.between_files(base, options, 11) == 0
    with allowing(Allowance(room=0, experts=1)):
        found = preflight.between_files(base, options, 11)
        assert found == max(repair, codes)
        alone = dataclasses.replace(options, quantizer="rtn")
        assert preflight.between_files(base, alone, 11) == repair
        half = preflight.between_files(base, alone, 11, kept=F)
        assert repair - half == (4 + 2 * 2) * F * D
        parts = preflight.written_bytes(base, options, 11)
    assert parts[preflight.SCRATCH] == found
    monkeypatch.setattr(preflight, "free_space", lambda folder: found)
    said = rf"scratch files {found / 1e3:.1f} kB.*choose another disk \(--scratch FOLDER"
    with pytest.raises(OSError, match=said):
        preflight.require_both(options, parts)


def test_states_of_evaluation_texts_are_scratch_files_where_memory_has_no_room(base, tmp_path):
    rows = [np.zeros((n, 24), kind) for n, kind in ((3, np.int32), (3, bool), (3, bool))]
    texts = {"a": Windows(*rows, 24, 24), "b": Windows(*(one[:1] for one in rows), 24, 24)}
    size = 2 * 4 * 24 * D * 4  # of the dense model and of another one, float32
    options = recipe(base, "ragged-bf16", window=24, repair="none", output=str(tmp_path))
    text = SimpleNamespace(tokens=np.zeros((11, 24), np.int32))
    job = SimpleNamespace(
        base=SimpleNamespace(about=base, config=base.config), recipe=options, output=tmp_path,
        calibration=text, evaluation=texts,
    )  # fmt: skip

    def needed(exports: bool) -> str:
        with pytest.raises(OSError) as told:
            preflight.check_disk(job, resumed=False, exports=exports)  # type: ignore[arg-type]
        return str(told.value)

    with pytest.MonkeyPatch.context() as patch, allowing(Allowance(room=0)):
        patch.setattr(preflight, "free_space", lambda folder: 0)
        patch.setattr(preflight, "scratch_bytes", lambda *_: 0)
        assert f"scratch files {size / 1e3:.1f} kB" in needed(True)
        assert "scratch files" not in needed(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "free_space", lambda folder: 0)
        patch.setattr(preflight, "scratch_bytes", lambda *_: 0)
        assert "scratch files" not in needed(True)
