"""The folder of a stage that goes layer by layer, with arrays made up: no model runs."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.quantized import quantize_layer
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import forward_hidden, in_batches, layer_forward, mapped
from moe_jax.transformer import abstract, init
from pruning.shrink import gptq_model
from pruning.shrink.gptq import Solved
from pruning.shrink.gptq_errors import LayerErrors
from pruning.shrink.gptq_model import (
    SUMMARY,
    codes_in,
    layer_errors,
    progress_bytes,
    quantize_model,
    with_codes,
)
from pruning.shrink.progress import STATES, LayerFolder, held_out
from tests.pruning.scores.test_layer import CONFIG
from tests.support.threads import together

SAID = {"plan": "abc", "texts": ["a"]}
FACTS = [{"name": "first", "kept": 3}, {"name": "second", "kept": 0}]


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    kept: int


@pytest.fixture
def folder(tmp_path):
    return LayerFolder(tmp_path / "layers", "done.json", "the layers", Layer)


def arrays(number: int) -> dict[str, np.ndarray]:
    return {"a": np.arange(6).reshape(2, 3) + number, "b": np.array([0.5 * number])}


def states(number: int, dtype=jnp.float32):
    values = [np.asarray(jnp.full((2, 3), number + i, dtype)) for i in range(3)]
    return values[:2], values[2:]


def flat(texts) -> list[np.ndarray]:
    return [values for text in texts for values in text]


def add(folder, number: int, dtype=jnp.float32) -> None:
    folder.add(number, arrays(number), SAID, FACTS[: number + 1], states(number, dtype))


def finished(folder):
    assert folder.open(SAID) is None
    add(folder, 0)
    add(folder, 1)
    folder.close(SAID, FACTS)
    return folder


@pytest.mark.parametrize(
    ("number", "check"),
    [(2, [1]), (7, [6]), (8, [7]), (9, [7]), (15, [7]), (16, [7, 15]), (25, [7, 15, 23])],
)
def test_one_window_in_eight_is_held_out_and_of_fewer_the_last(number, check):
    learn, held = held_out(number)
    assert list(held) == check and sorted([*learn, *held]) == list(range(number))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_killed_stage_goes_on_behind_its_last_layer(folder, dtype):
    assert folder.open(SAID) is None and not folder.is_closed
    add(folder, 0, dtype)
    layers, found = folder.open(SAID)
    assert layers == FACTS[:1]
    assert [len(part) for part in found] == [2, 1]
    for ours, theirs in zip(*map(flat, (found, states(0, dtype))), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(folder.arrays(0)["a"], arrays(0)["a"])
    assert not folder.is_closed and folder.read_summary() is None
    assert folder.fault() == f"the layers are no longer in {folder.path}"


def test_a_finished_stage_is_whole_and_says_of_what_it_is(folder):
    finished(folder)
    assert folder.is_closed and not (folder.path / STATES).exists()
    summary = folder.read_summary()
    assert (summary["provenance"], summary["layers"]) == (SAID, FACTS)
    assert folder.fault() == "" and folder.fault(plan="abc") == ""
    for other in ({"plan": "abd"}, {"plan": "abc", "repair": "x"}):
        assert folder.fault(**other) == (
            f"the layers in {folder.path} are of another plan, repair or text"
        )
    names = {"done.json", "layer-00000.safetensors", "layer-00001.safetensors"}
    assert {path.name for path in folder.path.iterdir()} == names
    folder.drop_states()


@pytest.mark.parametrize("damage", ["other", "gone"])
def test_a_layer_that_is_not_what_was_written_is_named(folder, damage):
    finished(folder)
    file = folder.path / "layer-00001.safetensors"
    file.unlink() if damage == "gone" else file.write_bytes(b"x")
    assert folder.fault() == f"{file} is not the file that was written"
    folder.arrays(0)
    with pytest.raises(InputError, match=r"layer-00001\.safetensors cannot be read .*; remove .*"):
        folder.arrays(1)


@pytest.mark.parametrize(
    "damage",
    [{"files": ["a"]}, {"files": "ab"}, {"layers": [{"name": 3, "kept": 3}, FACTS[1]]},
     {"layers": None}, {"provenance": 3}],
)  # fmt: skip
def test_a_damaged_summary_counts_as_none(folder, damage):
    finished(folder)
    file = folder.path / "done.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    assert folder.read_summary() is None and folder.is_closed and folder.fault()


@pytest.mark.parametrize("left", ["states", "closed"])
def test_what_is_of_something_else_goes_and_the_rest_stays(folder, left):
    finished(folder)
    if left == "states":
        add(folder, 0)
    (folder.path / "mine.txt").write_text("x")
    (folder.path / "layer-notes.safetensors").write_text("x")
    assert folder.open({**SAID, "plan": "abd"}) is None
    assert {path.name for path in folder.path.iterdir()} == {"mine.txt", "layer-notes.safetensors"}


def test_states_of_layers_that_say_something_else_are_not_gone_on_with(folder):
    folder.open(SAID)
    folder.add(0, arrays(0), SAID, [{"name": "first", "kept": "three"}], states(0))
    assert folder.open(SAID) is None and not list(folder.path.iterdir())


# --- of several processes ---


def shared(tmp_path, spread: Spread) -> LayerFolder:
    return LayerFolder(tmp_path / "layers", "done.json", "the layers", Layer, spread)


def add_own(folder, number: int) -> None:
    """As `add`, with other states in each process."""
    own = states(10 * folder.spread.process + number)
    folder.add(number, arrays(number), SAID, FACTS[: number + 1], own)


def files_in(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("killed", ["", "before all had written", "before all had renamed"])
def test_processes_go_on_behind_the_last_layer_whose_states_all_have(tmp_path, monkeypatch, killed):
    path = tmp_path / "layers"

    def two_layers(spread):
        folder = shared(tmp_path, spread)
        assert folder.open(SAID) is None
        add_own(folder, 0)
        spread.everyone(True)
        before = files_in(path)
        spread.everyone(True)
        add_own(folder, 1)
        return before

    before, _ = together(monkeypatch, 2, two_layers)
    names = {"layer-00000.safetensors", "layer-00001.safetensors", "states", "states-1"}
    assert set(files_in(path)) == names
    if killed:  # process 1, whose rename was not done; or which had not even written
        os.replace(path / "states-1", path / "states-1-next")
        (path / "states-1").write_bytes(before["states-1"])
    if killed == "before all had written":
        (path / "states-1-next").unlink()
        os.replace(path / "states", path / "states-next")
        (path / "states").write_bytes(before["states"])
    last = 0 if killed == "before all had written" else 1

    def go_on(spread):
        folder = shared(tmp_path, spread)
        found = folder.open(SAID)
        for number in range(last + 1, 2):
            add_own(folder, number)
        folder.close(SAID, FACTS)
        return found

    for process, (layers, found) in enumerate(together(monkeypatch, 2, go_on)):
        assert layers == FACTS[: last + 1]
        own = states(10 * process + last)
        for ours, theirs in zip(*map(flat, (found, own)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    names = {"done.json", "layer-00000.safetensors", "layer-00001.safetensors"}
    assert set(files_in(path)) == names
    assert shared(tmp_path, ALONE).fault(plan="abc") == ""


@pytest.mark.parametrize("lost", ["states", "states-1", "number"])
def test_processes_begin_anew_if_one_has_no_states_or_there_are_more(tmp_path, monkeypatch, lost):
    def layer(spread):
        folder = shared(tmp_path, spread)
        folder.open(SAID)
        add_own(folder, 0)

    together(monkeypatch, 2, layer)
    if lost != "number":
        file = tmp_path / "layers" / lost
        file.write_bytes(file.read_bytes()[:-5])
    count = 3 if lost == "number" else 2
    found = together(monkeypatch, count, lambda spread: shared(tmp_path, spread).open(SAID))
    assert found == [None] * count and files_in(tmp_path / "layers") == {}
    together(monkeypatch, 2, layer)
    assert shared(tmp_path, ALONE).open(SAID) is None


def test_codes_of_several_processes_are_those_of_one(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, num_layers=1, dense_layers=())
    model = jax.tree.map(lambda a: a * 10 if a.ndim == 2 else a, init(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (21, 12)).astype(np.int32)
    valid = np.arange(12)[None] < rng.integers(6, 13, (21, 1))

    def codes(folder, spread):
        options = {"group_size": 4, "provenance": SAID, "batch": 4}
        return quantize_model(model, tokens, valid, folder, spread=spread, **options)

    expected = codes(tmp_path / "one", ALONE)
    for found in together(monkeypatch, 3, lambda spread: codes(tmp_path / "all", spread)):
        for one, other in zip(expected, found, strict=True):
            assert (one.matrices, one.fallbacks) == (other.matrices, other.fallbacks)
            assert (other.nearest, other.gptq) == pytest.approx((one.nearest, one.gptq), rel=1e-5)
    ours, theirs = (codes_in(tmp_path / name).arrays(0) for name in ("all", "one"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_processes_that_take_layers_in_other_groups_are_refused_before_any_work(
    tmp_path, monkeypatch
):
    class Grouped:
        """A layer that each process takes in groups of another size."""

        def __init__(self, count: int):
            self.count, self.config = count, CONFIG

        def __len__(self) -> int:
            return 1

        def groups(self, index: int) -> int:
            return self.count

        def group(self, index: int, number: int):
            raise AssertionError("no layer is read")

    tokens, valid = np.zeros((4, 12), np.int32), np.ones((4, 12), bool)

    def codes(spread, count):
        options = {"group_size": 4, "provenance": SAID, "batch": 4}
        return quantize_model(Grouped(count), tokens, valid, tmp_path, spread=spread, **options)

    found = together(monkeypatch, 2, lambda spread: codes(spread, 1 + spread.process))
    for one in found:
        assert isinstance(one, InputError) and "--memory-limit that each has free" in str(one)
    assert not [*tmp_path.iterdir()]
    # Alike, they go on, to a layer that this source does not have.
    found = together(monkeypatch, 2, lambda spread: codes(spread, 2))
    assert all("memory-limit" not in str(one) for one in found)


# --- those of GPTQ ---


def test_states_of_gptq_take_two_of_the_text_with_its_padding_in_their_dtype():
    # 9 windows, and at most 3 of padding in either half; of 5 tokens, 16 wide.
    assert progress_bytes(CONFIG, (9, 5), 4, jnp.float32) == 2 * (9 + 6) * 5 * 16 * 4
    assert progress_bytes(CONFIG, (9, 5), 1, jnp.bfloat16) == 2 * 9 * 5 * 16 * 2


def test_errors_of_layers_are_those_of_a_finished_folder(tmp_path):
    errors = [LayerErrors(0.5, 0.25, 7, 1), LayerErrors(0.125, 0.0625, 9, 0)]
    told = list(map(dataclasses.asdict, errors))
    assert layer_errors(None) == [] and layer_errors(tmp_path / "gptq") == []
    codes = codes_in(tmp_path / "gptq")
    codes.open(SAID)
    for number in range(2):
        codes.add(number, arrays(number), SAID, told[: number + 1], states(number))
    assert layer_errors(tmp_path / "gptq") == []
    codes.close(SAID, told)
    assert layer_errors(tmp_path / "gptq") == told and (tmp_path / "gptq" / SUMMARY).exists()


def test_gptq_of_one_window_is_refused(tmp_path):
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(InputError, match=r"at least 2 calibration windows.*but has 1; give more"):
        quantize_model(None, tokens, tokens == 0, tmp_path, group_size=4, provenance={})


def test_each_text_goes_through_the_layers_as_they_are_rounded(tmp_path, monkeypatch):
    """With rounding to nearest in the place of GPTQ, the model that comes out is known."""
    rng = np.random.default_rng(0)

    def drawn(leaf):
        if leaf.dtype == jnp.int32:  # widths of experts
            return jnp.full(leaf.shape, CONFIG.moe.d_expert, jnp.int32)
        return jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), leaf.dtype)

    model = jax.tree.map(drawn, abstract(CONFIG))
    asked = []

    def rounded(layer, inputs, group_size, moment_bytes, spread):
        assert spread == ALONE
        asked.append([np.asarray(x) for x, _ in inputs])
        return quantize_layer(layer, group_size), Solved(5, 1)

    monkeypatch.setattr(gptq_model, "gptq_layer", rounded)
    tokens = rng.integers(0, 64, (2, 6)).astype(np.int32)
    valid = np.arange(6)[None] < np.array([[6], [4]])

    def stop(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    options = {"group_size": 4, "provenance": SAID, "batch": 1}
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, tokens, valid, tmp_path, on_layer=stop, **options)
    layers, x = codes_in(tmp_path).open(SAID)
    quantised = mapped(model, lambda index, layer: quantize_layer(layer, 4))
    wanted = forward_hidden(quantised, tokens, valid, batch=1)
    assert [len(part) for part in x] == [1, 1] and len(asked) == 3
    for number in range(2):  # the first is learnt from, the other held out
        some = valid[number]
        np.testing.assert_allclose(
            x[number][0][0][some], wanted[number][some], rtol=1e-4, atol=1e-4
        )
    # Errors are of the held-out window's real tokens, behind the rounded layers before.
    below = forward_hidden(FirstLayers(quantised, 2), tokens[1:], valid[1:], batch=1)
    place = in_batches(model, tokens[1:], valid[1:], 1).places[0]
    exact, near = (np.asarray(layer_forward(source.layer(2), jnp.asarray(below), place), float)
                   for source in (model, quantised))  # fmt: skip
    some = valid[1:]
    error = np.square(near - exact)[some].sum() / np.square(exact - below)[some].sum()
    assert layers[2]["gptq"] == layers[2]["nearest"] == pytest.approx(error, rel=1e-3)
    assert (layers[2]["matrices"], layers[2]["fallbacks"]) == (5, 1)
    # What lies in the folder is that model.
    again = with_codes(model, tmp_path, 4)
    for index in range(3):
        ours, theirs = (jax.tree.leaves(one.layer(index)) for one in (again, quantised))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)


class FirstLayers:
    """The beginning of a model."""

    def __init__(self, source, layers: int):
        self._source, self._layers = source, layers

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return self._layers
