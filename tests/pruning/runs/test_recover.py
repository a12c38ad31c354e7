"""`recover` as users call it: exports are what was trained, kills and resumes, bad input."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_model
from moe_jax.stream import forward_hidden
from pruning import Steps, recover
from pruning.recipe.recover_options import RecoverOptions
from pruning.recovery.deltas import DeltaConfig, rounded
from pruning.recovery.forward import layer_deltas, student_hidden
from pruning.stages.recovered import load_deltas, open_student, recovered_source
from tests.support.command import refused, run

TOKENS = np.random.default_rng(1).integers(0, 256, (2, 12)).astype(np.int32)
VALID = np.ones(TOKENS.shape, bool)
FULL = DeltaConfig(train="full", router_rank=0)


def options(texts: Path, output: Path, *more) -> tuple:
    return ("--text", texts / "good.txt", "--tokens", 448, "--output", output, "--batch", 2, *more)


@pytest.fixture(scope="module")
def recovered(scored, texts, tmp_path_factory) -> Path:
    """All weights trained through the rounding, from the run's plan."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    more = ("--train", "full", "--quantize-aware", "--learning-rate", 0.003, "--epochs", 3)
    exports = ("--export", "ragged-bf16", "ragged-int4")
    assert run("recover", scored, *options(texts, out, *more), *exports) == 0
    return out


def logits(source, dtype=jnp.float32) -> np.ndarray:
    return np.asarray(source.head(forward_hidden(source, TOKENS, VALID, dtype=dtype)))


@pytest.fixture(scope="module")
def trained(scored, recovered):
    """The student, what was trained, and the two together."""
    student = open_student(scored, Steps(quiet=True))
    deltas = load_deltas(recovered / "deltas.safetensors", student.source, FULL)
    return student, deltas, recovered_source(student.source, deltas, FULL)


def test_the_16_bit_export_computes_what_the_trained_student_does(recovered, trained):
    student, _, model = trained
    wanted, found = logits(model), logits(load_model(recovered / "exports/ragged-bf16"))
    size = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=0.02 * size)
    assert np.abs(logits(student.source) - wanted).max() > 0.03 * size  # it has learnt something


def test_the_4_bit_export_computes_what_was_rounded_in_training(recovered, trained):
    student, deltas, _ = trained
    config = DeltaConfig(train="full", router_rank=0, group_size=32)
    model = student.resident()
    layers = (rounded(layer, layer_deltas(deltas, i), 32) for i, layer in enumerate(model.layers))
    model = type(model)(**{**vars_of(model), "layers": tuple(layers)})
    hidden = jax.jit(
        lambda model, deltas: student_hidden(
            model, deltas, jnp.asarray(TOKENS), jnp.asarray(VALID), config=config
        )[0]
    )(model, deltas)
    wanted = np.asarray(model.head(hidden))
    found = logits(load_model(recovered / "exports/ragged-int4", dtype=jnp.float32))
    size = np.abs(wanted).max()
    # The router is float32 in training and bfloat16 on the disk.
    np.testing.assert_allclose(found, wanted, atol=0.01 * size)


def vars_of(model) -> dict:
    return {name: getattr(model, name) for name in type(model).__dataclass_fields__}


def test_report_page_and_card_say_what_was_trained_on_what(recovered, capsys):
    report = json.loads((recovered / "recover.json").read_text())
    assert report["text"]["tokens"] + report["text"]["held_out"] == 448
    models = {name for found in report["quality"].values() for name in found}
    assert models == {"dense", "pruned", "recovered", "ragged-bf16", "ragged-int4"}
    held = [row["held_out"]["loss"] for row in report["history"] if "held_out" in row]
    assert min(held) < held[0]
    rates = [row["learning_rate"] for row in report["history"] if "learning_rate" in row]
    np.testing.assert_allclose(max(rates), 0.003, rtol=1e-6)
    assert rates[0] < max(rates) > rates[-1]
    assert all(check["ok"] for check in report["verification"])
    assert {check["export"] for check in report["verification"]} == set(report["exports"])
    page = (recovered / "recover.html").read_text()
    assert "What came back" in page and "<img" in page
    card = (recovered / "exports/ragged-int4/README.md").read_text()
    assert "without training" not in card and "Training after pruning" in card
    assert "good.txt (448 tokens)" in card and "to 4 bits in every step" in card
    assert "| recovered |" in card
    there = {path.name for path in recovered.iterdir()}
    assert there == {"exports", "deltas.safetensors", "recover.json", "recover.html",
                     "recover.yaml"}  # fmt: skip


def test_a_finished_run_is_read_again(scored, texts, recovered, capsys):
    before = (recovered / "deltas.safetensors").stat().st_mtime_ns
    more = ("--train", "full", "--quantize-aware", "--learning-rate", 0.003, "--epochs", 3)
    exports = ("--export", "ragged-bf16", "ragged-int4")
    assert run("recover", scored, *options(texts, recovered, *more), *exports) == 0
    assert "this run is finished since" in capsys.readouterr().err
    assert (recovered / "deltas.safetensors").stat().st_mtime_ns == before
    assert run("recover", scored, *options(texts, recovered)) == 2
    assert "is not an interrupted run of these options" in capsys.readouterr().err


class Stopping(Steps):
    """Steps that end a run at a step of its training, and always before exports."""

    stop = -1

    @contextmanager
    def bar(self, name: str):
        if name.startswith("export"):
            raise KeyboardInterrupt
        with super().bar(name) as on_step:

            def step(done: int, total: int) -> None:
                on_step(done, total)
                if name == "train" and done == self.stop:
                    raise KeyboardInterrupt

            yield step


@pytest.mark.parametrize("mode", ["model", "layer"])
def test_a_killed_run_equals_an_undisturbed_one_bit_for_bit(scored, texts, tmp_path, mode):
    def train(name: str, stop: int = -1) -> Path:
        steps = Stopping(quiet=True)
        steps.stop = stop
        with pytest.raises(KeyboardInterrupt):
            recover(
                scored, text=(texts / "good.txt",), output=tmp_path / name, tokens=448, batch=1,
                epochs=2, rank=4, mode=mode, export=("ragged-bf16",), steps=steps,
            )  # fmt: skip
        return tmp_path / name / "deltas.safetensors"

    straight = train("straight")
    assert not train("killed", stop=7).exists()
    assert train("killed").read_bytes() == straight.read_bytes()
    if mode == "model":
        histories = [
            json.loads((tmp_path / name / "history.json").read_text())
            for name in ("straight", "killed")
        ]
        assert histories[0] == histories[1] and len(histories[0]["rows"]) > 10


NONSENSE = {
    "no text": ((), r"there is no text to train on; name files with --text"),
    "no tokens": (("--text", "good.txt", "--tokens", "0"), r"tokens=0 must be at least 1"),
    "words for tokens": (("--text", "good.txt", "--tokens", "many"), r"tokens='many' must be a"),
    "no such text": (("--text", "none.txt"), r"none\.txt"),
    "no learning": (("--text", "good.txt", "--learning-rate", "0"), r"learning_rate=0\.0 must be"),
    "a share beyond one": (("--text", "good.txt", "--next-token", "2"), r"next_token=2\.0 must"),
    "no integers": (
        ("--text", "good.txt", "--quantize-aware"),
        r"quantize_aware=True needs an int4 export, and ragged-bf16 is none",
    ),
    "attention by layers": (
        ("--text", "good.txt", "--mode", "layer", "--attention-rank", "2"),
        r"attention_rank=2 trains attention, which mode='layer' does not",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_by_name_and_nothing_is_written(case, scored, texts, tmp_path, capsys):
    words, message = NONSENSE[case]
    words = [texts / word if str(word).endswith(".txt") else word for word in words]
    found = refused(capsys, tmp_path, "recover", scored, *words, "--output", tmp_path / "out",
                    "--export", "ragged-bf16")  # fmt: skip
    assert re.search(message, found), found


def test_a_folder_that_is_no_run_is_refused(models, texts, tmp_path, capsys):
    how = options(texts, tmp_path / "out")
    found = refused(capsys, tmp_path, "recover", models / "single", *how)
    assert "holds no plan.json and is no export in a folder that does" in found
    assert "is no folder" in refused(capsys, tmp_path, "recover", tmp_path / "none", *how)


def test_a_folder_of_something_else_is_left_alone(scored, texts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    how = options(texts, tmp_path / "out", "--overwrite")
    found = refused(capsys, tmp_path, "recover", scored, *how)
    assert "is no folder of `recover`" in found


def test_presets_fill_in_what_is_not_given():
    paper = RecoverOptions(text=("a",), output="o", preset="paper").filled()
    assert (paper.learning_rate, paper.router_learning_rate) == (1e-4, 1e-6)
    assert (paper.rank, paper.alpha, paper.router_rank, paper.epochs) == (32, 128.0, 4, 2)
    assert not paper.needs_teacher and paper.next_token_from == 1
    mixed = RecoverOptions(text=("a",), output="o", next_token=0.5, next_token_from=0.0).filled()
    assert mixed.needs_teacher and mixed.epochs == 1
    assert (mixed.next_token_from, mixed.next_token) == (0.0, 0.5)
    assert RecoverOptions(text=("a",), output="o", tokens="10M").tokens == 10_000_000
    assert RecoverOptions(text=("a",), output="o", train="full").filled().router_rank == 0
