"""A limit on memory changes what is kept and read ahead, never a result, or is refused."""

import dataclasses
import json
import re
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.description import describe
from moe_jax.errors import InputError
from pruning import CompressionRecipe, audit, compare, estimate, evaluate, measure_quality
from pruning.kit.memory import AMPLE, Allowance, allowance, allowing, free_memory, own_memory
from pruning.kit.progress import Steps
from pruning.runs import cap, samples
from pruning.runs.cap import THRIFTIEST, allowance_within
from pruning.runs.memory import Foretold
from pruning.runs.plan import plan_folder
from pruning.runs.verify import verify
from pruning.scores.states import Projections
from pruning.stages import client
from pruning.stages.job import resolved
from pruning.text.windows import make_windows
from tests.support.command import given, read, refused, run

# As published, Qwen3-30B-A3B.
LARGE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
GB = 10**9
WHOLE = dataclasses.replace(THRIFTIEST, experts=None)


@pytest.fixture
def large(tmp_path):
    """What scoring the weight gradients of a short text takes of a large model."""
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    base = describe(tmp_path)
    how = {"weight_gradients": True, "batch": 1, "max_tokens": 2048, "planner": "fair"}
    recipe = CompressionRecipe(model=str(tmp_path), output="-", **how)
    foretold = Foretold(base, resolved(recipe, base))
    return lambda found: foretold.peaks(["scoring"], found)


def test_what_is_kept_shrinks_before_a_layer_is_no_longer_read_ahead(large):
    ample, scratch, single, thrifty = (
        large(Allowance(room=room, read_ahead=ahead))["scoring"]
        for ahead in (True, False)
        for room in (None, 1 << 30)
    )
    # The states that gradients go down by: before and in the middle of 48 layers, 2048 wide.
    assert ample - scratch == single - thrifty == 2 * 48 * 2048 * 2048 * 4
    layer = 2 * (3 * 128 * 768 * 2048 + 128 * 2048 + 2048 * 2 * (4096 + 512))  # in 16 bits
    assert ample - single == pytest.approx(layer, rel=0.01)
    assert allowance_within(ample, large) == AMPLE
    assert allowance_within(ample - 1, large) == Allowance(room=1 << 30)
    assert allowance_within(scratch - 1, large) == Allowance(room=1 << 30, read_ahead=False)
    # Too much still, as whoever asks finds; groups of experts are of no use to weight gradients.
    assert allowance_within(thrifty - 1, large, 128) == WHOLE


@pytest.fixture
def thrifty(monkeypatch):
    """No memory is free, so that a run makes do with least; what it then found."""
    seen = []

    def watch(found):
        seen.append(found)
        return allowing(found)

    def start() -> list[Allowance]:
        for module in (cap, samples):  # the sample, of whole models, is not written then
            monkeypatch.setattr(module, "free_memory", lambda: 0)
        monkeypatch.setattr(cap, "own_memory", lambda: 0)
        monkeypatch.setattr(cap, "allowing", watch)
        return seen

    return start


FLAGS = ("--gradients", "--weight-gradients", "--nll-ig", 2, "--nll-ablate", "--window", 64)


@pytest.mark.slow
def test_a_run_with_the_least_memory_gives_the_same(
    models, texts, tmp_path, monkeypatch, thrifty, scratch_files
):
    ahead, kept = [], []
    read_layer, take = Checkpoint._read_layer, Projections.take

    def reading(self, index):
        ahead.append(threading.current_thread() is not threading.main_thread())
        return read_layer(self, index)

    def taking(self, layer, rows):
        kept.append(take(self, layer, rows))
        return kept[-1]

    monkeypatch.setattr(Checkpoint, "_read_layer", reading)
    monkeypatch.setattr(Projections, "take", taking)
    text, written, done, statistics = texts / "good.txt", [], [], []
    for name in ("ample", "least"):
        found = thrifty() if name == "least" else []
        for seen in (ahead, kept, scratch_files):
            seen.clear()
        out = tmp_path / name
        assert run("--quiet", "compress", models / "single", *given(texts, out), *FLAGS,
                   "--evaluation", text, "--export", "ragged-int4") == 0  # fmt: skip
        rates = evaluate(out, [text], [0.5, 0.75], window=64, steps=Steps(quiet=True))
        is_least = name == "least"
        # In `evaluate` the logits take most, and groups of experts would change nothing.
        assert set(found) == ({WHOLE, THRIFTIEST} if is_least else set())
        # Layers in groups keep no rows for the way down.
        assert any(ahead) != is_least and bool(kept) != is_least and None not in kept
        done.append(len(scratch_files))
        report = json.loads((out / "report.json").read_text())
        statistics.append(load_file(out / "statistics.safetensors"))
        written.append([
            (out / "plan.safetensors").read_bytes(),
            *(path.read_bytes() for path in sorted(out.glob("exports/*/*.safetensors"))),
            report["quality"], report["verification"], rates["texts"],
        ])  # fmt: skip
    assert written[0] == written[1]
    for name, value in statistics[0].items():
        # Norms of the weights of single experts are summed in another order.
        of_norms = (name.endswith(("_norm", "_l1")) and "output" not in name) or name == "energy"
        near = {"rtol": 1e-6 if of_norms else 0}
        np.testing.assert_allclose(statistics[1][name], value, **near, err_msg=name)
    # Of the sweep, and beside it of two layers up and down; then of weight gradients, of one chunk
    # of nll-ig, of four models that compress measures, with what lies between groups of experts
    # beside, and of three in `evaluate`.
    assert done == [1, 1 + 2 * 2 + 1 + 1 + 2 * 4 + 3]
    assert allowance() == AMPLE


def test_measuring_from_a_scratch_file_gives_the_same_quality(models, tmp_path):
    source = open_checkpoint(models / "single")
    tokens = np.random.default_rng(0).integers(0, 300, 700)
    windows = make_windows(tokens, window=48, stride=20)
    dense, reference = measure_quality(source, windows, batch=3)
    same, there = measure_quality(source, windows, batch=3, scratch=tmp_path / "scratch")
    assert same == dense
    assert not [*(tmp_path / "scratch").iterdir()]  # the file has no name
    again = (measure_quality(source, windows, batch=3, reference=one)[0] for one in
             (reference, there))  # fmt: skip
    assert len(set(again)) == 1


def test_a_limit_that_cannot_be_kept_is_refused_with_the_least_that_can(
    models, texts, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ("score", models / "single", *given(texts, out), "--window", 64)
    shown = refused(capsys, tmp_path, *arguments, "--memory-limit", "300MB")
    said = r"memory_limit=300\.0 MB is too little to score, which takes about ([\d,]+) MB with "
    said += r"as little of a layer .* choose --memory-limit (\d+)MB"
    ((least, chosen),) = re.findall(said, shown)
    assert least == chosen and int(least) > 600
    refused(capsys, tmp_path, *arguments, "--memory-limit", f"{int(least) - 1}MB")
    assert run("--quiet", *arguments, "--memory-limit", f"{least}MB") == 0


def test_every_command_refuses_too_little(scored, models, texts, tmp_path, capsys):
    text = texts / "good.txt"
    scoring = ("compress", models / "single", *read(texts, tmp_path / "out"), "--window", 64)
    commands = {
        "verify|evaluate": scoring,
        "plan": ("plan", scored, "--prune-rate", 0.25),
        "export": ("export", scored, "--export", "ragged-bf16", "--overwrite"),
        "verify": ("verify", scored),
        "evaluate": ("eval", models / "single", "--text", text),
        "evaluate|verify": ("estimate", models / "single", "--planner", "fair", "--repair", "none"),
    }  # fmt: skip
    for stage, words in commands.items():
        shown = refused(capsys, scored, *words, "--memory-limit", "100MB")
        said = rf"memory_limit=100\.0 MB is too little to ({stage}), which takes about [\d,]+ MB"
        assert re.search(said, shown)
    assert not (tmp_path / "out").exists()
    recipe = CompressionRecipe(model=str(models / "single"), output="out", memory_limit="9GB")
    for command in (compare, audit):
        said = rf"memory_limit=9000\.0 MB is no option of {command.__name__}"
        with pytest.raises(InputError, match=said):
            command(recipe, steps=Steps(quiet=True))


@pytest.mark.slow
def test_an_estimate_says_what_stages_take_within_the_limit(tmp_path):
    # What scoring takes without gradients is of one layer: more of them are more tensors to list.
    (tmp_path / "config.json").write_text(json.dumps(LARGE | {"num_hidden_layers": 4}))
    recipe = CompressionRecipe(
        model=str(tmp_path), output="-", planner="fair", repair="none", batch=16
    )
    (ample,), (within,), (grouped,) = (
        estimate(dataclasses.replace(recipe, memory_limit=limit)) for limit in (None, "9GB", "7GB")
    )
    assert ample["memory_limit"] is None and within["memory_limit"] == 9 * GB
    assert ample["memory"]["scoring"] > 9 * GB > within["memory"]["scoring"] > 7 * GB
    assert max(grouped["memory"][stage] for stage in ("scoring", "export", "verify")) < 7 * GB
    with pytest.raises(InputError, match=r"is too little to score.*--batch 1 .*, with which"):
        estimate(dataclasses.replace(recipe, memory_limit="6GB"))
    # Gradients take little more; what takes layers whole says so, and what would not.
    estimate(dataclasses.replace(recipe, memory_limit="7.1GB", gradients=True))
    with pytest.raises(InputError, match=r"to score.*or no --expert-details, with which it takes"):
        estimate(dataclasses.replace(recipe, memory_limit="7GB", expert_details=True))


def test_a_limit_decides_nothing_about_a_result_so_a_run_goes_on_with_another(
    models, texts, tmp_path
):
    out = tmp_path / "out"
    arguments = ("--quiet", "score", models / "single", *given(texts, out), "--window", 64)
    assert run(*arguments) == 0
    before = (out / "statistics.safetensors").stat().st_mtime_ns
    assert run(*arguments, "--memory-limit", "9GB") == 0
    assert (out / "statistics.safetensors").stat().st_mtime_ns == before
    # Later commands keep to it, unless they are told another.
    with pytest.raises(InputError, match=r"memory_limit=1\.0 kB is too little to plan"):
        plan_folder(out, steps=Steps(quiet=True), memory_limit=1000)


def test_other_processes_have_what_the_limit_leaves():
    with allowing(Allowance(limit=own_memory() + (1 << 30))):
        assert (1 << 29) < free_memory() <= 1 << 30
    with allowing(Allowance(limit=1)):
        assert free_memory() == 0


@pytest.mark.slow
def test_under_a_limit_no_process_waits_for_the_next_question(scored):
    client._end()
    for limit, waiting in (("100GB", 0), (None, 1)):
        verify(scored, Steps(quiet=True), memory_limit=limit)
        assert client._process.cache_info().currsize == waiting
