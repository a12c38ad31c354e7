import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from convert.checkpoint import open_checkpoint
from convert.export_format import MIXED, ExportFormat
from moe_jax.errors import InputError
from moe_jax.norm import rms_norm
from moe_jax.stream import forward_hidden, in_batches, layer_forward
from pruning.budget.plan import PruningPlan
from pruning.budget.rules import RULES as KNOWN_RULES
from pruning.budget.whole_experts import replacement_vectors
from pruning.kit.errors import BudgetError
from pruning.kit.progress import Steps
from pruning.measure.quality import measure_quality
from pruning.recipe.recipe import CompressionRecipe
from pruning.report.comparison import Comparison
from pruning.report.comparison_sizes import size_tables
from pruning.runs import auto_bits, plan_groups
from pruning.runs import compare as comparing
from pruning.runs.apply import apply_plan
from pruning.runs.compared import task_plan
from pruning.runs.compared_task import Task
from pruning.scores.statistics import load_statistics
from pruning.shrink.masked import masked_hidden
from pruning.shrink.prune import PrunedSource
from pruning.shrink.repair_model import repair_model, with_repair
from pruning.stages.export import pruned_source
from pruning.stages.job import open_job
from pruning.stages.measure import first_tokens
from pruning.stages.sizes import export_of, folder_bytes
from pruning.text.kept_out import keep_out, kept_out_note
from tests.support import command, tiny

KINDS = ("bits", "target_bytes", "draws", "top_k", "skip_below")  # beside rates and rules
INT4 = ExportFormat("ragged-int4", 32)
MIDDLE = 160_000  # more than 4 bits take, less than all of 8
LITTLE = 130_000  # bytes: more than 4 bits take, less than 16 do without half of the channels
RULES = ["random", "uniform-act", "fair-energy", "experts-usage"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(tiny.save(tiny.tiny_model("qwen2_moe", mlp_only_layers=[0]), folder))


def random_plan(source, seed: int) -> PruningPlan:
    c = source.config
    rng = np.random.default_rng(seed)
    keep = rng.random((len(c.moe_layers), c.moe.num_experts, c.moe.d_expert)) < 0.6
    keep[:, seed % 4] = False
    return PruningPlan(keep, tuple(c.moe_layers), {})


def test_masked_plans_give_what_the_pruned_models_give(source):
    tokens, valid = tiny.tokens_and_mask(2, 12)
    plans = [random_plan(source, seed) for seed in range(3)]
    found = masked_hidden(source, tokens, valid, plans, batch=1)
    for plan, states in zip(plans, found, strict=True):
        expected = forward_hidden(PrunedSource(source, plan), tokens, valid, batch=2)
        np.testing.assert_allclose(states[valid], expected[valid], rtol=2e-5, atol=2e-5)
    assert np.abs(found[0] - found[1])[valid].max() > 0.01


def test_a_constant_stands_in_with_the_routing_weight_of_its_expert(source):
    """Against a loop over tokens and experts in numpy, on the last layer's input."""
    c, (tokens, valid) = source.config, tiny.tokens_and_mask(2, 12)
    plan = random_plan(source, 1)
    last = len(source) - 1
    plan.keep[:] = True
    plan.keep[plan.layer_indices.index(last), [1, 5]] = False
    rng = np.random.default_rng(0)
    sums = rng.normal(size=(len(plan.layer_indices), c.moe.num_experts, c.d_model))
    routed = np.full(sums.shape[:2], 2.0)
    constants = replacement_vectors(sums, routed, plan.counts)
    replaced = dataclasses.replace(plan, constants=constants)
    plain, added = masked_hidden(source, tokens, valid, [plan, replaced], batch=2)
    np.testing.assert_array_equal(
        replaced.added(plan.layer_indices.index(last))[[1, 5]], constants[-1]
    )
    weight = routing_weights(source, tokens, valid)  # [B, T, E]
    expected = sum(weight[:, :, e, None] * sums[-1, e] / 2.0 for e in (1, 5))
    assert np.abs(expected[valid]).max() > 0.1
    np.testing.assert_allclose((added - plain)[valid], expected[valid], rtol=1e-4, atol=2e-5)


def routing_weights(source, tokens, valid) -> np.ndarray:
    # The last layer's router by numpy, on hidden states of the layers before it.
    text = in_batches(source, tokens, valid, len(tokens))
    x, place = jnp.asarray(text.embedded(source, jnp.float32)[0]), text.places[0]
    for index in range(len(source) - 1):
        x = layer_forward(source.layer(index), x, place)
    layer = source.layer(len(source) - 1)
    middle = layer.attend(x, place)[0]
    normed = np.asarray(rms_norm(middle, layer.mlp_norm, layer.norm_eps), np.float64)
    logits = normed @ np.asarray(layer.mlp.router, np.float64).T
    probability = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probability /= probability.sum(axis=-1, keepdims=True)
    k = source.config.moe.experts_per_token
    chosen = probability >= np.sort(probability, axis=-1)[..., -k, None]
    weight = np.where(chosen, probability, 0.0)
    if source.config.moe.renormalize:
        weight /= weight.sum(axis=-1, keepdims=True)
    return weight


@pytest.fixture(scope="module")
def recipe(models, texts, tmp_path_factory) -> CompressionRecipe:
    return CompressionRecipe(
        model=str(models / "single"), output=str(tmp_path_factory.mktemp("compare") / "out"),
        calibration=(str(texts / "good.txt"),), evaluation=(str(texts / "good.txt"),), batch=4,
        block=8,
    )  # fmt: skip


def run(recipe, rules=RULES, rates=(0.25, 0.5), **changes) -> Comparison:
    kinds = {name: changes.pop(name) for name in KINDS if name in changes}
    return comparing.compare(
        dataclasses.replace(recipe, evaluation_tokens=60, **changes), rates, rules,
        steps=Steps(quiet=True), **kinds,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Comparison:
    return run(recipe, output=str(tmp_path_factory.mktemp("whole") / "out"))


def test_all_rules_keep_the_same_channels_and_are_ranked_by_their_loss(whole):
    assert len(whole.results) == 2 * (3 + len(RULES) - 1) and not whole.refused
    for result in whole.results:
        known = KNOWN_RULES[result.rule]
        assert (result.family, result.about) == (known.family, known.about)
    for rate in whole.rates:
        assert len({result.kept for result in whole.results if result.rate == rate}) == 1
    added = [line.added for line in whole.lines() if line.rate == 0.25]
    assert added == sorted(added) and len(added) == len(RULES)
    assert next(line for line in whole.lines() if line.rule == "random").spread > 0.0


def test_losses_are_given_as_a_share_of_what_random_channels_add(whole):
    added = {}
    for r in whole.results:
        gap = np.mean([q["nll"] - whole.dense[text]["nll"] for text, q in r.quality.items()])
        added.setdefault((r.rule, r.rate), []).append(gap)
    for line in whole.lines():
        chance = np.mean(added["random", line.rate])
        wanted = np.mean(added[line.rule, line.rate]) / chance if chance > 0 else np.nan
        np.testing.assert_allclose(line.of_random, wanted, rtol=1e-12)
    assert any(line.of_random > 0 for line in whole.lines() if line.rule != "random")
    without = whole.only(lambda result: result.rule != "random")
    assert all(np.isnan(line.of_random) for line in without.lines())
    column = without.table().header.index("÷ random")
    assert {row[column] for row in without.table().rows} == {"-"}


@pytest.mark.parametrize(("width", "shown"), [
    (120, ["+nats", "÷ random", "KL", "top-1"]), (90, ["+nats", "÷ random", "KL"]),
    (60, ["+nats", "÷ random"]),
])  # fmt: skip
def test_a_narrow_terminal_leaves_columns_out_and_breaks_no_number(whole, width, shown):
    table = whole.terminal_table(width)
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    kind = lambda name: name.split(" 0.")[0]  # noqa: E731
    names = [kind(str(column.header)) for column in table.columns][2:]
    assert list(dict.fromkeys(names)) == shown
    columns = [c for c, name in enumerate(whole.table().header) if kind(name) in shown]
    for row in whole.table().rows:
        assert all(number in text for column in columns for number in row[column].split())


def test_an_interrupted_comparison_goes_on_and_ends_with_the_same_file(
    recipe, whole, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(plan_groups, "GROUP", 5)
    original, calls = plan_groups._run_group, []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(plan_groups, "_run_group", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert len(Comparison.load(file_of(recipe)).results) == 5
    found = run(recipe)
    assert len(calls) == 4  # 5 of 12 were done
    for one, other in zip(found.results, whole.results, strict=True):
        assert dataclasses.replace(one, quality={}) == dataclasses.replace(other, quality={})
        for text, quality in one.quality.items():
            assert quality == pytest.approx(other.quality[text], rel=1e-5, abs=1e-6)
    before = file_of(recipe).read_bytes()
    run(recipe)
    assert file_of(recipe).read_bytes() == before and len(calls) == 4
    run(recipe, rules=["layer-topk-energy"], rates=[0.25])
    assert len(Comparison.load(file_of(recipe)).results) == 13


def file_of(recipe):
    return Path(recipe.output) / "compare.json"


@pytest.fixture
def repairable(recipe, tmp_path) -> CompressionRecipe:
    rng = np.random.default_rng(0)
    (tmp_path / "words.txt").write_text("".join(rng.choice(list("abcdefgh "), 900)))
    return dataclasses.replace(
        recipe, output=str(tmp_path / "out"), calibration=(str(tmp_path / "words.txt"),),
        window=32, evaluation_tokens=60,
    )  # fmt: skip


@pytest.mark.slow
def test_every_rule_is_measured_with_and_without_repair(repairable, tmp_path):
    rules, steps = ["uniform-act", "fair-energy"], Steps(quiet=True)
    plain = comparing.compare(repairable, [0.5], rules, steps=steps)
    both = comparing.compare(repairable, [0.5], rules, repair="layer", steps=steps)
    assert both.results[:2] == plain.results
    names = {"uniform-act", "fair-energy", "uniform-act+layer", "fair-energy+layer"}
    assert {line.rule for line in both.lines()} == names == set(both.ranked())
    assert {row[1] for row in both.table().rows} == names
    page = (tmp_path / "out" / "compare.html").read_text()
    rows = (tmp_path / "out" / "compare.csv").read_text().splitlines()
    assert all(name in page for name in names)
    repaired = rows[0].split(",").index("repair")
    assert [row.split(",")[repaired] for row in rows] == ["repair", "", "", "layer", "layer"]
    assert not (tmp_path / "out" / "compare-repair").exists()
    before = file_of(repairable).read_bytes()
    again = comparing.compare(repairable, [0.5], rules, steps=steps)
    assert file_of(repairable).read_bytes() == before and again.results == plain.results
    # What it measures of a rule is what a run that repairs its plan makes.
    same = dataclasses.replace(repairable, bits=16, planner="fair", evaluation_tokens=60 + 32)
    job, one = open_job(same), both.results[2]
    statistics, provenance = load_statistics(tmp_path / "out" / "statistics.safetensors")
    task = Task("uniform-act", 0.5, 0)
    plan = task_plan(job, statistics, provenance, task, one.kept)
    repair_model(
        job.base, plan, job.calibration.tokens, job.calibration.valid, tmp_path / "alone",
        mode="layer", provenance={}, batch=4,
    )  # fmt: skip
    repaired, found = with_repair(PrunedSource(job.base, plan), plan, tmp_path / "alone"), {}
    for name, windows in job.evaluation.items():
        quality, _ = measure_quality(repaired, first_tokens(windows, 60), batch=4)
        found[name] = quality.nll
    assert (one.rule, one.repair) == ("uniform-act", "layer")
    assert {name: quality["nll"] for name, quality in one.quality.items()} == pytest.approx(
        found, rel=1e-5
    )
    assert one.quality != both.results[0].quality


def test_rows_by_bytes_are_what_exports_of_their_plans_take_and_lose(recipe, tmp_path):
    """4 bits alone, pruning alone and both, the last against a folder as it is written."""
    asked = dataclasses.replace(recipe, output=str(tmp_path / "out"), block=32)
    kinds: dict[str, Any] = {"bits": (16, 4), "target_bytes": [LITTLE]}
    found = run(asked, ["uniform-act"], [0.5], **kinds)
    rows = {(r.name, r.target): r for r in found.results}
    assert rows.keys() == {
        ("unpruned 4-bit", 0), ("unpruned 4-bit", LITTLE), ("uniform-act", 0),
        ("uniform-act 4-bit", 0),
    }  # fmt: skip
    ((_, refused),) = ((r.name, r) for r in found.refused)
    assert (refused.rule, refused.bits, refused.target) == ("uniform-act", 16, LITTLE)
    assert "no plan is as small in 16 bits" in refused.reason
    job = open_job(dataclasses.replace(asked, bits=16, planner="fair", evaluation_tokens=60 + 64))
    statistics, provenance = load_statistics(tmp_path / "out" / "statistics.safetensors")
    both, (name,) = rows["uniform-act 4-bit", 0], job.evaluation
    task = Task("uniform-act", 0.5)
    plan, form = task_plan(job, statistics, provenance, task, both.kept), INT4
    source = pruned_source(job.base, plan, form)
    folder = export_of(job.base.about, plan, form).write(source, tmp_path / "written")
    text = first_tokens(job.evaluation[name], 60)
    quality, _ = measure_quality(open_checkpoint(folder), text, batch=4)
    assert both.bytes == folder_bytes(folder)
    shares = statistics.tokens / statistics.total_tokens
    assert both.active_bytes == pytest.approx(met_bytes(folder, shares), abs=1)
    assert both.quality[name]["nll"] == pytest.approx(quality.nll, rel=1e-5)
    losses = {key: row.quality[name]["nll"] for key, row in rows.items()}
    alone = losses.pop(("unpruned 4-bit", LITTLE))
    assert losses["unpruned 4-bit", 0] == pytest.approx(alone, rel=1e-6)
    assert len({round(loss, 4) for loss in (*losses.values(), found.dense[name]["nll"])}) == 4
    page = (tmp_path / "out" / "compare.html").read_text()
    assert all(word in page for word in ("By bytes written", "At 0.1 MB", "as small in 16 bits"))
    before = file_of(asked).read_bytes()
    plain = run(asked, ["uniform-act"], [0.5])
    assert file_of(asked).read_bytes() == before
    assert plain.results == (rows["uniform-act", 0],)


def test_layers_with_bits_of_their_own_lose_what_their_folder_does(recipe, tmp_path, monkeypatch):
    # Whichever is best here, the one whose layers differ is what shall be written.
    monkeypatch.setattr(auto_bits, "least_diverging", lambda job, plans, steps: plans[0])
    asked = dataclasses.replace(recipe, output=str(tmp_path / "out"), block=32, window=32)
    kinds: dict[str, Any] = {"bits": ("auto",), "target_bytes": [MIDDLE, 1000]}
    found = run(asked, ["fair-energy"], (), **kinds)
    (auto,) = found.results
    assert (auto.name, auto.target) == ("fair-energy auto bits", MIDDLE)
    assert auto.bytes <= MIDDLE and len(set(auto.layer_bits)) > 1
    assert {(r.name, r.reason) for r in found.refused} == {
        ("fair-energy auto bits", "no plan is as small in auto bits")
    }
    # Its plan is there, and is written as any other.
    kept = tmp_path / "out" / "auto" / f"fair-energy-{MIDDLE}"
    checks = apply_plan(kept, asked.model, tmp_path / "applied", steps=Steps(quiet=True))
    assert {check.export for check in checks} == {MIXED} and all(check.ok for check in checks)
    assert {"logits in JAX", "logits in transformers"} <= {one.check for one in checks if one.done}
    plan, folder = PruningPlan.load(kept), tmp_path / "applied" / "exports" / MIXED
    assert list(plan.layer_bits) == auto.layer_bits
    assert auto.layer_shares == pytest.approx(plan.keep.mean(axis=(1, 2)))
    assert auto.rate == pytest.approx(1 - plan.keep.mean(), abs=1e-6)
    said = plan.provenance
    assert (said["target"], said["cost"], said["planner"]) == (MIDDLE, auto.bytes, "fair")
    card = " ".join((folder / "README.md").read_text().split())
    for own in set(auto.layer_bits):
        assert f"{own} bits in {auto.layer_bits.count(own)} layers" in card
    job = open_job(dataclasses.replace(asked, bits=16, planner="fair", evaluation_tokens=60 + 32))
    noted = load_statistics(tmp_path / "out" / "statistics.safetensors")[1]["kept_out"]
    assert noted == kept_out_note(keep_out(job.calibration)[1])  # not what it was planned by
    text = first_tokens(job.evaluation["good"], 60)
    quality, _ = measure_quality(open_checkpoint(folder), text, batch=4)
    assert auto.bytes == folder_bytes(folder)
    assert auto.quality["good"]["nll"] == pytest.approx(quality.nll, rel=1e-5)
    (table,) = (t for t in size_tables(found) if t.title.startswith("Channels and bits"))
    ((name, place, bits, _),) = table.rows
    assert (name, place) == (auto.name, "0.2 MB")
    assert bits == " ".join(map(str, auto.layer_bits))
    # It goes on without measuring anything again.
    before = file_of(asked).read_bytes()
    assert run(asked, ["fair-energy"], (), **kinds) == found
    assert file_of(asked).read_bytes() == before


def met_bytes(folder: Path, shares: np.ndarray) -> float:
    """What a token reads of a folder, tensor by tensor."""
    met = 0.0
    for name, tensor in load_file(folder / "model.safetensors").items():
        place = re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
        share = shares[int(place[1]), int(place[2])] if place else "embed_tokens" not in name
        met += float(share) * tensor.nbytes
    return met


def test_fewer_experts_lose_what_transformers_does_with_so_many(recipe, models, tmp_path,
                                                                monkeypatch):  # fmt: skip
    asked = dataclasses.replace(recipe, output=str(tmp_path / "out"))
    given: dict[str, Any] = {"top_k": [1], "skip_below": [0.7]}
    found = run(asked, ["uniform-act"], [0.5], **given)
    rows = {r.name: r for r in found.results}
    assert list(rows) == ["unpruned", "top-1", "skip-0.7", "uniform-act"]
    job = open_job(dataclasses.replace(asked, bits=16, planner="fair", evaluation_tokens=60 + 64))
    windows = first_tokens(job.evaluation["good"], 60)
    for name, k in (("unpruned", 2), ("top-1", 1)):
        model = tiny.tiny_model("qwen2_moe", num_experts_per_tok=k, **command.SIZES)
        for weight in model.parameters():  # commands read 16 bits
            weight.data = weight.data.bfloat16().float()
        logits = tiny.torch_logits(model, windows.tokens, windows.valid)
        logp = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
        at = np.nonzero(windows.scored)
        losses = -logp[(*at, windows.tokens[at[0], at[1] + 1])]
        quality = rows[name].quality["good"]
        assert quality["nll"] == pytest.approx(losses.mean(), rel=1e-5)
        assert quality["tokens"] == len(losses)
    assert rows["unpruned"].quality["good"]["nll"] == pytest.approx(found.dense["good"]["nll"])
    # What a token meets: one or two of eight experts in each layer, of these all or half.
    sizes = {n: t.size for n, t in load_file(models / "single" / "model.safetensors").items()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    always = sum(sizes.values()) - routed - sizes["model.embed_tokens.weight"]
    whole, one = always + routed // 4, always + routed // 8
    statistics, _ = load_statistics(tmp_path / "out" / "statistics.safetensors")
    assert statistics.tokens.sum() == 4 * statistics.total_tokens
    assert [r.active for r in rows.values()] == [
        whole, one, pytest.approx(rows["skip-0.7"].active_bytes / 2), one
    ]  # fmt: skip
    assert one < rows["skip-0.7"].active < whole
    for r in rows.values():
        assert r.active_bytes == pytest.approx(2 * r.active)
        assert r.parameters == sum(sizes.values()) - (routed // 2 if r.rate else 0)
        assert r.bytes >= 2 * r.parameters
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "By what a token reads, least first" in page and "skip-0.7" in page
    before = file_of(asked).read_bytes()
    monkeypatch.setattr(plan_groups, "_run_group", None)  # nothing is left to measure
    assert run(asked, ["uniform-act"], [0.5], **given) == found
    assert file_of(asked).read_bytes() == before


def test_draws_of_the_calibration_text_are_planned_for_and_measured_on_their_own(
    repairable, tmp_path, monkeypatch
):
    asked = dataclasses.replace(repairable, output=str(tmp_path / "drawn"))
    rules = ["fair-energy"]
    found = run(asked, rules, [0.5], draws=2)
    assert [(r.rule, r.draw) for r in found.results] == [(*rules, draw) for draw in (0, 1, 2)]
    assert len(found.lines()) == 1
    # Each is what its own statistics give, and its kept channels are compared with the text's.
    job = open_job(dataclasses.replace(asked, bits=16, planner="fair", evaluation_tokens=60 + 32))
    plans = {}
    for draw, folder in ((0, "."), (1, "draws/1"), (2, "draws/2")):
        statistics, noted = load_statistics(tmp_path / "drawn" / folder / "statistics.safetensors")
        for rule in rules:
            task = Task(rule, 0.5)
            plans[rule, draw] = task_plan(job, statistics, noted, task, 512).keep
        assert draw == 0 or noted["sources"][0]["drawn"] == [0, draw]
    for result in found.results:
        own, whole = plans[result.rule, result.draw], plans[result.rule, 0]
        assert result.overlap == pytest.approx((own & whole).sum() / (own | whole).sum())
    assert all(r.overlap < 1 for r in found.results if r.draw)
    assert len({r.quality["good"]["nll"] for r in found.results if r.rule == "fair-energy"}) == 3
    page = (tmp_path / "drawn" / "compare.html").read_text()
    assert "Over 2 draws of the calibration text, at 0.5" in page
    before = file_of(asked).read_bytes()
    monkeypatch.setattr(plan_groups, "_run_group", None)  # nothing is left to measure
    assert run(asked, rules, [0.5], draws=2) == found
    assert file_of(asked).read_bytes() == before


def test_a_comparison_killed_in_a_repair_goes_on_after_its_last_layer(
    repairable, tmp_path, monkeypatch
):
    original, layers = plan_groups.repaired_hidden, []

    def killed(job, plan, mode, bits, text, on_layer):
        def visited(layer):
            layers.append(layer)
            on_layer(layer)
            if len(layers) == 1:
                raise KeyboardInterrupt

        return original(job, plan, mode, bits, text, visited)

    monkeypatch.setattr(plan_groups, "repaired_hidden", killed)

    def compared(folder):
        recipe = dataclasses.replace(repairable, output=str(tmp_path / folder))
        return comparing.compare(
            recipe, [0.5], ["uniform-act"], repair="expert", steps=Steps(quiet=True)
        )

    with pytest.raises(KeyboardInterrupt):
        compared("out")
    assert (tmp_path / "out" / "compare-repair" / "states").exists()
    assert len(Comparison.load(tmp_path / "out" / "compare.json").results) == 1
    found = compared("out")
    assert layers == list(range(len(layers))) and len(layers) > 1
    assert found == compared("calm")


def test_without_text_for_a_repair_nothing_is_begun(repairable, tmp_path):
    with pytest.raises(InputError, match="takes 3 windows of calibration text, there are 2"):
        comparing.compare(
            dataclasses.replace(repairable, max_tokens=64), [0.5], ["uniform-act"],
            repair="expert", steps=Steps(quiet=True),
        )  # fmt: skip
    assert not (tmp_path / "out" / "statistics.json").exists()


def test_results_of_other_texts_are_refused_unless_overwritten(recipe):
    run(recipe, rules=["uniform-act"], rates=[0.25])
    path = file_of(recipe)
    stored = json.loads(path.read_text())
    stored["key"]["model_hash"] = "another"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"results of another model_hash; .*--overwrite"):
        run(recipe, rules=["uniform-act"], rates=[0.25])
    found = run(recipe, rules=["uniform-act"], rates=[0.25], overwrite=True)
    assert len(found.results) == 1


def test_a_finished_comparison_is_measured_again_if_overwritten(recipe):
    run(recipe, rules=["uniform-act"], rates=[0.25])
    stored = json.loads(file_of(recipe).read_text())
    wrong = json.loads(json.dumps(stored))
    for one in wrong["results"][0]["quality"].values():
        one["nll"] = 99.0
    file_of(recipe).write_text(json.dumps(wrong))
    kept = run(recipe, rules=["uniform-act"], rates=[0.5])
    assert len(Comparison.load(file_of(recipe)).results) == 2 and len(kept.results) == 1
    # Without its page it was killed on the way: what it has is gone on with.
    page = file_of(recipe).with_name("compare.html")
    page.unlink()
    run(recipe, rules=["uniform-act"], rates=[0.25], overwrite=True)
    assert json.loads(file_of(recipe).read_text())["results"][0] == wrong["results"][0]
    run(recipe, rules=["uniform-act"], rates=[0.25], overwrite=True)
    assert json.loads(file_of(recipe).read_text())["results"] == stored["results"]


def test_the_command_prints_the_ranking_and_writes_table_and_page(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("compare", models / "single", *command.read(texts, out), "--rules", "uniform-*e*")
    assert command.run("--quiet", *arguments, "--prune-rate", 0.5) == 2
    assert "--gradients" in capsys.readouterr().err and not out.exists()
    arguments = (*arguments[:-1], "uniform-energy", "--evaluation", texts / "good.txt")
    assert command.run("--quiet", *arguments, "--prune-rate", 0.5) == 0
    assert "uniform-energy" in capsys.readouterr().out
    rows = (out / "compare.csv").read_text().splitlines()
    assert len(rows) == 2 and rows[1].startswith("uniform-energy,uniform,0.5,0,")
    page = (out / "compare.html").read_text()
    assert "uniform-energy" in page and "data:image/png" in page
    assert "http" not in page and 'src="/' not in page
    repaired = ("--calibration", texts / "good.txt", "--window", 32, "--repair")
    assert command.run("--quiet", *arguments, *repaired, "--prune-rate", 0.5, "--overwrite") == 0
    assert "uniform-energy+layer" in capsys.readouterr().out


@pytest.fixture
def two_texts(tmp_path) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    for name in ("first", "second"):
        (tmp_path / f"{name}.txt").write_text("".join(rng.choice(list("abcdef gh"), 300)))
    return str(tmp_path / "first.txt"), str(tmp_path / "second.txt")


def test_each_of_several_texts_is_measured_as_if_it_were_the_only_one(recipe, two_texts, tmp_path):
    def measured(name, *texts):
        folder = str(tmp_path / name)
        return run(recipe, rules=["uniform-act"], rates=[0.25], output=folder, evaluation=texts)

    both = measured("both", *two_texts)
    assert set(both.dense) == {"first", "second"}
    for name, text in zip(("first", "second"), two_texts, strict=True):
        alone = measured(name, text)
        assert both.dense[name]["nll"] == pytest.approx(alone.dense[name]["nll"], rel=1e-5)
        (one,), (other,) = both.results, alone.results
        assert one.quality[name] == pytest.approx(other.quality[name], rel=1e-4, abs=1e-6)
    qualities = both.results[0].quality
    assert abs(qualities["first"]["nll"] - qualities["second"]["nll"]) > 1e-3


def other_words(file) -> None:
    """Another text of as many bytes, which are the tokens here."""
    path = Path(file)
    path.write_text(path.read_text()[::-1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("seed", {"seed": 1}),
        ("dtype", {"dtype": "bfloat16"}),
        ("window", {"window": 32}),
        ("block", {"block": 4}),
        ("evaluation", {"evaluation_tokens": 120}),
        ("calibration", {"max_tokens": 200}),
        ("evaluation", "second"),
        ("calibration", "first"),
    ],
)
def test_results_are_those_of_one_seed_type_window_and_text(
    models, two_texts, tmp_path, name, changes
):
    asked = CompressionRecipe(
        model=str(models / "single"), output=str(tmp_path / "out"), batch=4, block=8,
        calibration=two_texts[:1], evaluation=two_texts[1:], evaluation_tokens=60,
    )  # fmt: skip

    def compared(recipe):
        return comparing.compare(recipe, [0.25], ["uniform-act"], steps=Steps(quiet=True))

    compared(asked)
    before = file_of(asked).read_bytes()
    if isinstance(changes, str):
        other_words(two_texts[0 if changes == "first" else 1])
        changes = {}
    with pytest.raises(ValueError, match=f"results of another {name}") as caught:
        compared(dataclasses.replace(asked, **changes))
    assert "--overwrite" in str(caught.value) and file_of(asked).read_bytes() == before


def test_a_moved_model_and_moved_texts_have_the_same_results(models, two_texts, tmp_path):
    asked = CompressionRecipe(
        model=str(models / "single"), output=str(tmp_path / "out"), batch=4, block=8,
        calibration=two_texts[:1], evaluation=two_texts[1:], evaluation_tokens=60,
    )  # fmt: skip
    comparing.compare(asked, [0.25], ["uniform-act"], steps=Steps(quiet=True))
    before = file_of(asked).read_bytes()
    moved = shutil.copytree(models / "single", tmp_path / "moved")
    comparing.compare(
        dataclasses.replace(asked, model=str(moved)), [0.25], ["uniform-act"],
        steps=Steps(quiet=True),
    )  # fmt: skip
    assert file_of(asked).read_bytes() == before


def test_only_a_rules_own_refusal_is_stored_as_one(recipe, tmp_path, monkeypatch):
    refusing = dataclasses.replace(recipe, output=str(tmp_path / "out"))

    def budget(*_):
        raise BudgetError("the budget pays for no expert")

    def disk(*_):
        raise InputError("words.txt cannot be read")

    def rule(prepare):
        return dataclasses.replace(KNOWN_RULES["uniform-act"], prepare=prepare)

    monkeypatch.setitem(KNOWN_RULES, "poor", rule(budget))
    found = run(refusing, rules=["uniform-act", "poor"], rates=[0.25])
    (refused,) = found.refused
    assert (refused.rule, refused.reason) == ("poor", "the budget pays for no expert")
    monkeypatch.setitem(KNOWN_RULES, "reading", rule(disk))
    with pytest.raises(InputError, match=r"words\.txt cannot be read"):
        run(refusing, rules=["reading"], rates=[0.25])
    (refused,) = Comparison.load(file_of(refusing)).refused
    assert refused.rule == "poor"
