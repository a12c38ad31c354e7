"""`recover` as users call it: exports are what was trained, kills and resumes, bad input."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_model
from moe_jax.errors import InputError
from moe_jax.stream import forward_hidden
from pruning import Steps, recover
from pruning.kit.errors import VerificationError
from pruning.recipe.recover_options import RecoverOptions, usual_rate
from pruning.recovery.deltas import DeltaConfig, rounded
from pruning.recovery.forward import layer_deltas, student_hidden
from pruning.runs import recover as recovering
from pruning.stages import verify as verifying
from pruning.stages.checks import Check
from pruning.stages.client import Answer
from pruning.stages.recover_folder import RecoverFolder
from pruning.stages.recovered import load_deltas, open_student, recovered_source
from tests.pruning.recovery.students import placed_student
from tests.support.command import given, refused, run

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


@pytest.mark.slow
def test_the_16_bit_export_computes_what_the_trained_student_does(recovered, trained):
    student, _, model = trained
    wanted, found = logits(model), logits(load_model(recovered / "exports/ragged-bf16"))
    size = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=0.02 * size)
    assert np.abs(logits(student.source) - wanted).max() > 0.03 * size  # it has learnt something


def test_the_4_bit_export_computes_what_was_rounded_in_training(recovered, trained):
    student, deltas, _ = trained
    config = DeltaConfig(train="full", router_rank=0, group_size=32)
    model = placed_student(student.source).model
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["model", "layer"])
def test_a_killed_run_equals_an_undisturbed_one_bit_for_bit(scored, texts, tmp_path, mode):
    def train(name: str, stop: int = -1) -> Path:
        steps = Stopping(quiet=True)
        steps.stop = stop
        with pytest.raises(KeyboardInterrupt):
            recover(
                scored, text=(texts / "good.txt",), output=tmp_path / name, tokens=448, batch=1,
                train="dora", epochs=2, rank=4, mode=mode, export=("ragged-bf16",), steps=steps,
            )  # fmt: skip
        return tmp_path / name / "deltas.safetensors"

    straight = train("straight")
    assert not train("killed", stop=7).exists()
    took = tmp_path / "killed" / "training.json"
    spent = json.loads(took.read_text())
    assert 0 < spent["seconds"] < 600 and spent["peak_memory_bytes"] > 1e8
    took.write_text(json.dumps({"seconds": 5000.0, "peak_memory_bytes": 1 << 50}))
    assert train("killed").read_bytes() == straight.read_bytes()
    both = json.loads(took.read_text())  # of the two sessions
    assert 5000 < both["seconds"] < 5600 and both["peak_memory_bytes"] == 1 << 50
    histories = [
        json.loads((tmp_path / name / "history.json").read_text())
        for name in ("straight", "killed")
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]["rows"]) > (10 if mode == "model" else 1)


def stopped(folder: Path, output: Path, **how: Any) -> None:
    """A run that is killed at the first step of its training."""
    steps = Stopping(quiet=True)
    steps.stop = 0
    with pytest.raises(KeyboardInterrupt):
        recover(folder, output=output, batch=2, steps=steps, **how)
    assert not (output / "deltas.safetensors").exists()


def test_an_export_that_was_found_wrong_is_written_again_without_training(
    scored, texts, tmp_path, monkeypatch
):
    out, stages = tmp_path / "out", []

    def train() -> None:
        steps = Steps(quiet=True)
        try:
            recover(
                scored, text=(texts / "good.txt",), tokens=448, batch=2, epochs=1, train="router",
                export=("ragged-bf16",), output=out, steps=steps,
            )  # fmt: skip
        finally:
            stages.append([one["name"] for one in steps.stages])

    def wrong(*given, **how):
        return [Check("ragged-bf16", "tensors", False, "not as planned")]

    with monkeypatch.context() as patch, pytest.raises(VerificationError, match="not as planned"):
        patch.setattr(recovering, "verify_export", wrong)
        train()
    (out / "exports" / "ragged-bf16" / "model.safetensors").write_bytes(b"")
    trained = (out / "deltas.safetensors").read_bytes()
    train()
    assert "train" in stages[0] and "train" not in stages[1]
    assert "export ragged-bf16" in stages[1]
    assert (out / "deltas.safetensors").read_bytes() == trained
    assert all(one["ok"] for one in json.loads((out / "recover.json").read_text())["verification"])
    assert not [*out.glob("predictions*")] and not (out / "checkpoints").exists()
    train()
    assert "export ragged-bf16" not in stages[2]


def test_no_predictions_are_left_wherever_they_were_begun(scored, texts, tmp_path):
    how: dict[str, Any] = {"text": (texts / "good.txt",), "tokens": 448, "export": ("ragged-bf16",)}
    stopped(scored, tmp_path / "out", **how)
    assert (tmp_path / "out" / "predictions.npy").is_file()
    how |= {"scratch": tmp_path / "scratch", "output": tmp_path / "out", "batch": 2}
    recover(scored, steps=Steps(quiet=True), **how)
    assert not [*tmp_path.rglob("*predictions*")]


def test_kept_predictions_stay_also_beside_the_run_that_made_them(scored, texts, tmp_path):
    out = tmp_path / "out"
    recover(
        scored, text=(texts / "good.txt",), tokens=448, batch=2, epochs=1, train="router",
        export=("ragged-bf16",), output=out, scratch=out, keep_predictions=True,
        steps=Steps(quiet=True),
    )  # fmt: skip
    assert len([*out.glob("dense-*.npy")]) == 1 and not [*out.glob("predictions*")]


def test_kept_predictions_serve_other_recoveries_on_the_same_text(scored, texts, tmp_path):
    def train(name: str, text: Path, **how: Any) -> tuple[set[str], bytes]:
        report = recover(
            scored, text=(text,), output=tmp_path / name, tokens=448, batch=2, epochs=1,
            train="router", export=("ragged-bf16",), steps=Steps(quiet=True), **how,
        )  # fmt: skip
        return {one["name"] for one in report.stages}, (
            tmp_path / name / "deltas.safetensors"
        ).read_bytes()

    other = tmp_path / "other.txt"
    other.write_text("Pack my box with five dozen liquor jugs! " * 20)
    kept: dict[str, Any] = {"scratch": tmp_path / "scratch", "keep_predictions": True}
    words = "predictions of the dense model"
    stages, wanted = train("alone", texts / "good.txt")
    assert words in stages
    assert words in train("first", texts / "good.txt", **kept)[0]
    stages, found = train("second", texts / "good.txt", **kept)
    assert words not in stages and found == wanted
    assert words in train("third", other, **kept)[0]
    assert words in train("fourth", other, top=8, **kept)[0]
    assert len([*(tmp_path / "scratch").iterdir()]) == 3
    with pytest.raises(InputError, match=r"keep_predictions .* name it with --scratch"):
        train("fifth", other, keep_predictions=True)


def test_predictions_in_a_shared_folder_are_of_the_run_that_reads_them(scored, texts, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Pack my box with five dozen liquor jugs! " * 20)
    how: dict[str, Any] = {
        "tokens": 448,
        "export": ("ragged-bf16",),
        "scratch": tmp_path / "scratch",
    }
    for place in ("one", "two"):  # folders of one name
        stopped(scored, tmp_path / place / "out", text=(texts / "good.txt",), **how)
    stopped(scored, tmp_path / "one" / "out", text=(other,), overwrite=True, **how)
    stopped(scored, tmp_path / "alone", text=(other,), **(how | {"scratch": None}))
    wanted = np.load(tmp_path / "alone" / "predictions.npy")
    found = [np.load(path) for path in (tmp_path / "scratch").iterdir()]
    assert len(found) == 2  # what was overwritten is gone
    assert sorted(np.array_equal(one, wanted) for one in found) == [False, True]


def test_an_overwriting_run_that_was_killed_begins_anew(scored, texts, recovered, tmp_path):
    out = Path(shutil.copytree(recovered, tmp_path / "out"))
    how = {
        "text": (texts / "good.txt",), "tokens": 448, "train": "full", "quantize_aware": True,
        "learning_rate": 0.003, "epochs": 3, "export": ("ragged-bf16", "ragged-int4"),
        "overwrite": True,
    }  # fmt: skip

    def killed(self, names):
        (out / names[0]).unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecoverFolder, "_remove", killed)
        recover(scored, output=out, batch=2, steps=Steps(quiet=True), **how)
    assert not (out / "recover.json").exists() and (out / "deltas.safetensors").exists()
    stopped(scored, out, **how)
    assert not (out / "exports").exists() or not list((out / "exports").iterdir())


@pytest.fixture(scope="module")
def repaired(models, tmp_path_factory) -> Path:
    """A run whose weights were repaired, with an export of them."""
    folder = tmp_path_factory.mktemp("repaired")
    words = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs!".split()
    rng = np.random.default_rng(0)
    (folder / "words.txt").write_text(" ".join(rng.choice(words, 400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifying, "client_answer", lambda *_: Answer(undone="of no interest here"))
        how = ("--prune-rate", 0.5, "--window", 32, "--bits", 16, "--repair", "layer")
        text = given(folder, folder / "out", "words.txt")
        assert run("compress", models / "single", *text, *how) == 0
    return folder / "out"


@pytest.mark.slow
def test_an_export_that_was_not_repaired_is_trained_as_it_is(repaired):
    steps = Steps(quiet=True)
    plain = Path(shutil.copytree(repaired, repaired.parent / "plain"))
    assert run("export", plain, "--export", "ragged-bf16", "--repair", "none", "--overwrite") == 0
    pairs = [
        (open_student(repaired, steps), open_student(repaired / "exports/ragged-bf16", steps)),
        (open_student(plain / "exports/ragged-bf16", steps),) * 2,
    ]
    assert [one.repair is None for pair in pairs for one in pair] == [False, False, True, True]
    downs = [[one.source.layer(1).mlp.experts.w_down for one in pair] for pair in pairs]
    np.testing.assert_array_equal(*downs[0])
    assert np.abs(downs[0][0] - downs[1][0]).max() > 1e-3


def weights(export: Path) -> dict[str, np.ndarray]:
    """All tensors but those of routers."""
    found = {}
    for file in export.glob("*.safetensors"):
        found |= load_file(file)
    return {name: one for name, one in found.items() if not name.endswith("mlp.gate.weight")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "mode"), [(".", "model"), (".", "layer"), ("exports/ragged-bf16", "model")]
)
def test_training_begins_with_the_repaired_weights_and_the_card_says_both(
    repaired, texts, tmp_path, monkeypatch, place, mode
):
    monkeypatch.setattr(verifying, "client_answer", lambda *_: Answer(undone="of no interest here"))
    recover(
        repaired / place, text=(texts / "good.txt",), output=tmp_path / "out", tokens=448, batch=2,
        train="router", mode=mode, export=("ragged-bf16",), steps=Steps(quiet=True),
    )  # fmt: skip
    found = weights(tmp_path / "out/exports/ragged-bf16")
    wanted = weights(repaired / "exports/ragged-bf16")
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        np.testing.assert_array_equal(found[name], one, name)
    card = (tmp_path / "out/exports/ragged-bf16/README.md").read_text()
    assert "refitted by least squares" in card and "then trained, see below" in " ".join(
        card.split()
    )
    assert "Training after pruning" in card


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
    "predictions by layers": (
        ("--text", "good.txt", "--mode", "layer", "--next-token", "0.5"),
        r"next_token=0\.5 is about predicted tokens, and mode='layer' predicts none",
    ),
    "answers by layers": (
        ("--text", "good.txt", "--mode", "layer", "--loss-on", "answers"),
        r"loss_on='answers' is about predicted tokens, and mode='layer' predicts none",
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
    assert paper.train == "dora"
    assert not paper.needs_teacher and paper.next_token_from == 1
    alone: dict[str, Any] = {"preset": "paper", "train": "router"}
    named = RecoverOptions(text=("a",), output="o", learning_rate=1e-3, **alone).filled()
    assert named.router_learning_rate == 1e-3  # what is asked for, not the preset's
    assert RecoverOptions(text=("a",), output="o", **alone).filled().router_learning_rate == 1e-6
    mixed = RecoverOptions(text=("a",), output="o", next_token=0.5, next_token_from=0.0).filled()
    assert mixed.needs_teacher and (mixed.train, mixed.epochs) == ("full", 3)
    assert (mixed.learning_rate, mixed.router_rank) == (None, 0)
    assert mixed.router_learning_rate is None  # by the size of each router
    routers = RecoverOptions(text=("a",), output="o", train="router").filled()
    assert (routers.learning_rate, routers.router_learning_rate) == (None, None)
    assert (mixed.next_token_from, mixed.next_token) == (0.0, 0.5)
    assert RecoverOptions(text=("a",), output="o", tokens="10M").tokens == 10_000_000
    assert RecoverOptions(text=("a",), output="o", train="full").filled().router_rank == 0


@pytest.mark.parametrize(
    ("train", "width", "rate"),
    [("full", 64, 1e-3), ("full", 256, 1e-3), ("full", 576, 4.4e-4), ("full", 2048, 1.3e-4),
     ("dora", 7168, 7.1e-5), ("lora", 512, 1e-3), ("router", 2048, 1e-3)],
)  # fmt: skip
def test_wider_models_take_smaller_steps(train, width, rate):
    assert usual_rate(train, width) == rate
