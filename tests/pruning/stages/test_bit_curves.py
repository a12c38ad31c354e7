"""What layers lose alone, against models made so, and what is chosen, against all there is."""

import dataclasses
import itertools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from convert.export_format import MIXED
from moe_jax.errors import InputError
from moe_jax.stream import forward_hidden
from pruning.budget.plan import PruningPlan
from pruning.kit.errors import BudgetError
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from pruning.stages import bit_curves
from pruning.stages import joint_plan as joint
from pruning.stages.bit_curves import RECORD, Curves, measured_curves
from pruning.stages.job import Job, resolved
from pruning.stages.sizes import export_of, form_of
from pruning.text.calibration import TokenBatch

SHAPE = (2, 8, 64)
WHOLE = 1024


@pytest.fixture(scope="module")
def job(models, tmp_path_factory) -> Job:
    base: Any = open_checkpoint(models / "single", dtype=jnp.bfloat16)
    recipe = CompressionRecipe(
        model=str(models / "single"), output=str(tmp_path_factory.mktemp("curves")), planner="fair",
        repair="none", batch=2,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
    kept_out = TokenBatch(tokens, np.ones(tokens.shape, bool))
    return Job(resolved(recipe, base.about), base, base, kept_out, {}, kept_out=kept_out)


def plan_at(channels: int) -> PruningPlan:
    """The first experts keep all channels, as far as they last; layers by turns."""
    if channels % 256:
        raise BudgetError("no such plan")
    own = np.arange(512).reshape(8, 64) < channels // 2
    return PruningPlan(np.stack([own, own[::-1]]), (0, 1))


def written(job, plan):
    return export_of(job.base.about, plan, form_of(job.recipe, MIXED, plan))


def divergence(job, source) -> float:
    text, head = job.kept_out, job.base.head
    logp = []
    for model in (job.base, source):
        logits = np.asarray(head(forward_hidden(model, text.tokens, text.valid)), np.float64)
        logits = logits[:, :-1]
        logp.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    return float((np.exp(logp[0]) * (logp[0] - logp[1])).sum(axis=-1).mean())


def test_curves_are_the_divergence_of_models_of_which_one_layer_is_changed(job, monkeypatch):
    monkeypatch.setattr(bit_curves, "REMOVED", (1 / 4, 1 / 2, 7 / 8))  # the last has no plan
    steps = Steps(quiet=True)
    curves = measured_curves(job, plan_at, 32, steps)
    assert curves.kept.tolist() == [[512, 384, 256]] * 2
    wanted = np.zeros((2, 3))
    for slot, (place, channels) in itertools.product(range(2), ((1, 768), (2, 512))):
        keep = np.ones(SHAPE, bool)
        keep[slot] = plan_at(channels).keep[slot]
        wanted[slot, place] = divergence(job, PrunedSource(job.base, PruningPlan(keep, (0, 1))))
    np.testing.assert_allclose(curves.error, wanted, rtol=2e-3, atol=1e-6)
    assert (wanted[:, 1:] > 1e-4).all() and curves.rounding.keys() == {4, 8, 16}
    for bits, name in ((4, "int4"), (8, "int8")):
        for index in range(2):
            storages = ["bf16", "bf16"]
            storages[index] = name
            alone = divergence(job, QuantizedSource(job.base, 32, storages))
            assert curves.rounding[bits][index] == pytest.approx(alone, rel=2e-3, abs=1e-6)
    assert (curves.rounding[4] > 1e-5).all() and not curves.rounding[16].any()
    # What was measured is remembered; a damaged record is not believed.
    record = job.output / RECORD
    stored = json.loads(record.read_text())
    measured, names = stored["divergences"], []
    assert len(measured) == 2 * 2 + 2 * 2
    original = bit_curves.masked_hidden

    def masked_hidden(*given, **how):
        names.append(len(given[3]))
        return original(*given, **how)

    monkeypatch.setattr(bit_curves, "masked_hidden", masked_hidden)
    again = measured_curves(job, plan_at, 32, steps)
    np.testing.assert_array_equal(again.error, curves.error)
    assert not names
    record.write_text("[]")
    measured_curves(job, plan_at, 32, steps)
    assert names == [8] and json.loads(record.read_text()) == stored
    with pytest.raises(InputError, match=r"kept out of the calibration text, which has 2, fewer t"):
        measured_curves(dataclasses.replace(job, kept_out=None), plan_at, 32, steps)


def test_no_channels_and_bits_of_layers_within_the_bytes_err_less(job, monkeypatch):
    monkeypatch.setattr(joint, "LEVELS", 4)
    rng = np.random.default_rng(1)
    kept = np.array([[512, 384, 256, 128]] * 2)
    levels = {512: 1024, 384: 768, 256: 512, 128: 256}  # of a layer -> of the plan
    for _ in range(4):
        error = np.sort(rng.random((2, 4)), axis=1) * [0, 1, 1, 1]
        rounding = {4: rng.random(2) / 2, 8: rng.random(2) / 50, 16: np.zeros(2)}
        curves = Curves(kept, error, rounding)
        every = []
        for places in itertools.product(range(4), range(4)):
            for bits in itertools.product((4, 8, 16), repeat=2):
                keep = np.ones(SHAPE, bool)
                for slot, place in enumerate(places):
                    if place:
                        keep[slot] = plan_at(levels[int(kept[slot, place])]).keep[slot]
                plan = PruningPlan(keep, (0, 1), layer_bits=bits)
                lost = sum(error[s, p] + rounding[b][s]
                           for s, (p, b) in enumerate(zip(places, bits, strict=True)))  # fmt: skip
                every.append((written(job, plan).nbytes, lost, plan))
        sizes = sorted(size for size, *_ in every)
        for target in (sizes[3], sizes[40] + 100, sizes[90] + 100, sizes[-1]):
            found = joint.joint_plan(job, curves, plan_at, lambda p: written(job, p), target, 256)
            size, best = written(job, found).nbytes, min(x[1] for x in every if x[0] <= target)
            assert size <= target
            # Headers are not known to the byte before all is chosen.
            spare = min(x[1] for x in every if x[0] <= target - 90)
            told = found.provenance["foretold_divergence"]
            assert best - 1e-12 <= told <= spare + 1e-12
            (same,) = (x[1] for x in every if x[2].content_hash == found.content_hash)
            assert same == pytest.approx(told)
            # Of those that leave every layer more than half.
            few = [x for x in every if (x[2].counts.sum(axis=1) > 256).all()]
            if min(x[0] for x in few) <= target - 90:
                given = job, curves, plan_at, lambda p: written(job, p), target, 256
                found = joint.joint_plan(*given, least=0.7)
                assert (found.counts.sum(axis=1) >= 0.7 * 512).all()
                told = found.provenance["foretold_divergence"]
                assert min(x[1] for x in few if x[0] <= target) - 1e-12 <= told
                assert told <= min(x[1] for x in few if x[0] <= target - 90) + 1e-12
        with pytest.raises(BudgetError):
            joint.joint_plan(job, curves, plan_at, lambda p: written(job, p), sizes[0] - 1, 256)


def test_constants_in_the_place_of_experts_come_from_the_plan_of_each_layer(job, monkeypatch):
    monkeypatch.setattr(joint, "LEVELS", 2)

    def with_constants(channels: int) -> PruningPlan:
        plan = plan_at(channels)
        gone = (plan.counts == 0).sum(axis=1)
        constants = tuple(np.full((n, 32), s + 1.0, np.float32) for s, n in enumerate(gone))
        return dataclasses.replace(plan, constants=constants)

    curves = Curves(np.array([[512, 256]] * 2), np.array([[0.0, 1.0], [0.0, 0.1]]),
                    {4: np.zeros(2), 8: np.zeros(2), 16: np.zeros(2)})  # fmt: skip
    whole = PruningPlan(np.ones(SHAPE, bool), (0, 1), layer_bits=(4, 4))
    target = written(job, whole).nbytes - 1
    found = joint.joint_plan(job, curves, with_constants, lambda p: written(job, p), target, 256)
    assert found.counts.sum(axis=1).tolist() == [512, 256] and found.layer_bits == (4, 4)
    assert found.constants is not None
    assert [c.shape for c in found.constants] == [(0, 32), (4, 32)]
    assert (found.constants[1] == 2.0).all()


def test_plans_of_the_same_bits_throughout_fit_and_the_least_diverging_is_taken(job):
    whole = PruningPlan(np.ones(SHAPE, bool), (0, 1))
    size = {bits: written(job, dataclasses.replace(whole, layer_bits=(bits, bits))).nbytes
            for bits in (4, 8, 16)}  # fmt: skip
    target = size[8] - 1
    most = {4: WHOLE, 8: 768, 16: 256}
    assert size[16] > target > size[4]
    plans = joint.even_plans(job, plan_at, lambda p: written(job, p), target, {**most, 16: 0})
    assert [(plan.layer_bits, int(plan.counts.sum())) for plan in plans] == [
        ((4, 4), WHOLE), ((8, 8), 768)
    ]  # fmt: skip
    assert all(plan.provenance["cost"] == written(job, plan).nbytes <= target for plan in plans)
    none = joint.even_plans(job, plan_at, lambda p: written(job, p), target, {8: 700, 16: WHOLE})
    assert none == []  # no rule keeps 700, and 16 bits do not fit
    gone = dataclasses.replace(plan_at(512), layer_bits=(16, 16))
    alone = {}
    for plan in (gone, *plans):
        pruned = PrunedSource(job.base, dataclasses.replace(plan, layer_bits=()))
        names = [{4: "int4", 8: "int8", 16: "bf16"}[bits] for bits in plan.layer_bits]
        alone[plan.content_hash] = divergence(job, QuantizedSource(pruned, 32, names))
    best = min(alone.values())
    for order in ((gone, *plans), (*plans, gone)):
        found = bit_curves.least_diverging(job, order, Steps(quiet=True))
        assert alone[found.content_hash] == best
        assert found.provenance["measured_divergence"] == pytest.approx(best, rel=2e-3, abs=1e-6)
