"""`compress --bits auto`: channels and bits of each layer within a size, from one command."""

import json

import pytest

from convert import open_checkpoint
from pruning.budget.plan import PruningPlan
from pruning.runs import auto_bits
from pruning.stages.sizes import folder_bytes
from tests.support.command import read, refused, run

AUTO = ("--bits", "auto")


@pytest.mark.slow
def test_a_run_chooses_channels_and_bits_within_a_size_and_measures_what_it_takes(
    models, texts, tmp_path, monkeypatch
):
    measured = []
    original = auto_bits.least_diverging

    def least_diverging(job, plans, steps):
        measured.extend(plans)
        return original(job, plans, steps)

    monkeypatch.setattr(auto_bits, "least_diverging", least_diverging)
    out = tmp_path / "out"
    asked = ("compress", models / "single", *read(texts, out), *AUTO, "--target-bytes", "150kB")
    asked = (*asked, "--planner", "fair", "--window", 32, "--repair", "layer")
    assert run("--quiet", *asked) == 0
    folder = out / "exports" / "ragged-mixed"
    plan, report = PruningPlan.load(out), json.loads((out / "report.json").read_text())
    assert folder_bytes(folder) == plan.provenance["cost"] <= 150_000
    (best,) = {p.content_hash: p for p in measured if p.content_hash == plan.content_hash}.values()
    assert best.layer_bits == plan.layer_bits and len(plan.layer_bits) == 2
    assert {p.layer_bits for p in measured} >= {(4, 4), (8, 8)}  # beside those that differ
    known = json.loads((out / "bit-curves.json").read_text())["divergences"]
    assert plan.provenance["measured_divergence"] == known[plan.content_hash]
    assert known[plan.content_hash] == min(known[p.content_hash] for p in measured)
    assert {c["check"] for c in report["verification"] if c["done"] and c["ok"]} >= {
        "tensors", "logits in JAX", "logits in transformers"
    }  # fmt: skip
    assert report["plan"]["layer_bits"] == list(plan.layer_bits)
    assert report["repair"] is not None
    row = f"from the first up: {' '.join(map(str, plan.layer_bits))}"
    assert "bits of layers" in (page := (out / "report.html").read_text()) and row in page
    assert len(open_checkpoint(folder)) == 2
    # Given again it is finished; other bits and sizes are another run's.
    before = (out / "report.json").read_bytes()
    assert run("--quiet", *asked) == 0 and (out / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "bits='auto' are those of the least loss within a size; give one with --target-bytes"),
        (("--prune-rate", 0.5), "within a size; give one with --target-bytes or --target-factor"),
        (("--target-bytes", "1MB", "--export", "ragged-int4"),
         "export='ragged-int4' has no place for; leave --export away, or choose --bits 4"),
        (("--target-bytes", "1MB", "--quantizer", "gptq"), "may give a layer others; use rtn"),
        (("--target-bytes", "1MB", "--weights-only"), "--weights-only"),
        (("--target-bytes", "1MB", "--max-tokens", 150), "which has 3, fewer than 4; give more"),
    ],
)  # fmt: skip
def test_what_bits_of_layers_need_is_said_before_the_work(
    models, texts, tmp_path, capsys, more, message
):
    text = ("--output", tmp_path / "out") if "--weights-only" in more else read(
        texts, tmp_path / "out")  # fmt: skip
    shown = refused(capsys, tmp_path, "compress", models / "single", *text, *AUTO, *more)
    assert message in shown


def test_a_folder_of_such_a_run_is_not_planned_anew(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ("score", models / "single", *read(texts, out), *AUTO, "--target-bytes", "150kB")
    assert run("--quiet", *asked, "--planner", "fair") == 0
    shown = refused(capsys, tmp_path, "plan", out, "--target-bytes", "140kB")
    assert "which `moe-compress compress` does: give it its options again" in shown
    shown = refused(capsys, tmp_path, "estimate", models / "single", *AUTO)
    assert "bits='auto'" in shown
