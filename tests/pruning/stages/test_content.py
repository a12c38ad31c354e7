"""What lies in a folder beside what an export writes, with made-up tensors and no model."""

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.description import describe
from convert.export import Export
from convert.export_format import ExportFormat
from convert.reader import CheckpointError
from pruning.stages import content
from pruning.stages.content import TensorComparison
from tests.pruning.stages.test_sizes import CONFIG
from tests.support.threads import together

WIDTHS = ((32, 64), (), (96, 32))
UP = "model.layers.0.mlp.experts.1.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("content") / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": 1}')
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "notes.txt").write_text("of the base alone")
    return folder


def export_of(base: Path, name: str) -> Export:
    return Export(describe(base), WIDTHS, ExportFormat(name, 32))


def made_up(export: Export) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for name, (dtype, shape) in export.specs.items():
        if dtype.kind == "i":
            found[name] = rng.integers(-9, 9, shape).astype(dtype)
        else:  # scales of either sign, none small
            size = rng.choice([-1, 1], shape) * rng.uniform(0.5, 2, shape)
            found[name] = size.astype(dtype)
    return found


@pytest.fixture
def stored(base, tmp_path):
    """A folder with the tensors of an export, and those tensors."""

    def make(name: str, **changes: np.ndarray | None) -> tuple[Export, dict, Path]:
        export = export_of(base, name)
        wanted = made_up(export)
        tensors = {n: v for n, v in (wanted | changes).items() if v is not None}
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return export, wanted, folder

    return make


def compared(folder, export, wanted, **options) -> TensorComparison:
    found = TensorComparison(folder, export, **options)
    found.add(wanted.items())
    return found


@pytest.mark.parametrize("part", [5, 16 << 20])
@pytest.mark.parametrize("name", ["ragged-bf16", "padded-int4"])
def test_equal_tensors_are_equal_and_one_other_element_is_named(stored, monkeypatch, name, part):
    monkeypatch.setattr(content, "PART", part)
    export, wanted, folder = stored(name)
    found = compared(folder, export, wanted)
    assert found.names == frozenset(wanted) and found.problems_of(found.names) == []
    size = sum(value.nbytes for value in wanted.values())
    said = f"{len(wanted)} tensors, {size / 1e3:.1f} kB, bit for bit as planned"
    assert found.words(found.names) == said
    assert found.words([NORM]) == "1 tensors, 0.1 kB, bit for bit as planned"
    for tensor in (NORM, UP if name == "ragged-bf16" else f"{UP}_packed"):
        for place in ((0,) * wanted[tensor].ndim, tuple(n - 1 for n in wanted[tensor].shape),
                      tuple(n // 2 for n in wanted[tensor].shape)):  # fmt: skip
            other = wanted[tensor].copy()
            other[place] += 1
            again = compared(folder, export, {tensor: other})
            old, new = wanted[tensor][place], other[place]
            assert again.problems_of([tensor]) == [f"{tensor}{list(place)} is {old}, not {new}"]


def test_what_each_process_has_compared_all_know(stored, monkeypatch):
    export, wanted, folder = stored("ragged-bf16")
    other = wanted | {NORM: wanted[NORM] + 1, UP: wanted[UP] * 2}

    def work(spread):
        own = {n: v for i, (n, v) in enumerate(other.items()) if i % 3 == spread.process}
        found = compared(folder, export, {} if spread.process == 2 else own)
        found.share(spread)
        return found.problems_of(found.names), found.words(found.names)

    seen = {name: value for i, (name, value) in enumerate(other.items()) if i % 3 < 2}
    alone = compared(folder, export, seen)
    expected = alone.problems_of(alone.names), alone.words(alone.names)
    assert together(monkeypatch, 3, work) == [expected] * 3
    assert any(" was not compared" in one for one in expected[0])


def test_bits_count_and_not_values(stored, base):
    nan, zero = np.full(64, np.nan, ml_dtypes.bfloat16), np.zeros(64, ml_dtypes.bfloat16)
    export, wanted, folder = stored("ragged-bf16", **{NORM: nan})
    assert compared(folder, export, {NORM: nan}).problems_of([NORM]) == []
    other = nan.copy()
    other.view(np.uint16)[9] ^= 1
    assert compared(folder, export, {NORM: other}).problems_of([NORM]) == [
        f"{NORM}[9] is nan, not nan"
    ]
    save_file(wanted | {NORM: zero}, folder / "model.safetensors")
    negative = zero.copy()
    negative[63] = -0.0
    assert compared(folder, export, {NORM: negative}).problems_of([NORM]) == [
        f"{NORM}[63] is 0.0, not -0.0"
    ]


def test_what_is_not_compared_is_a_problem(stored):
    export, wanted, folder = stored("ragged-bf16")
    found = compared(folder, export, {NORM: wanted[NORM]})
    assert found.problems_of([NORM, UP]) == [f"{UP} was not compared"]
    assert found.words([NORM, UP]) == "1 tensors, 0.1 kB, bit for bit as planned"


def test_headers_say_what_is_missing_foreign_or_of_another_kind(stored):
    head, query = "lm_head.weight", "model.layers.2.self_attn.q_proj.weight"
    export, wanted, folder = stored(
        "ragged-bf16", **{UP: None, "extra": np.ones(3, np.float32),
        head: np.ones((100, 64), np.float32), query: np.ones((64, 32), ml_dtypes.bfloat16)},
    )  # fmt: skip
    found = compared(folder, export, {n: v for n, v in wanted.items() if n != UP})
    assert found.names == {*wanted, "extra"}
    assert found.problems_of(found.names) == [
        "extra is not part of the export",
        f"{head} is float32, not bfloat16",
        f"{UP} is missing",
        f"{query} has shape [64, 32], not [64, 64]",
    ]


def test_a_small_scale_is_a_problem_and_codes_may_be_unknown(stored, base):
    scale, codes = f"{UP}_scale", f"{UP}_packed"
    export, wanted, folder = stored("ragged-int4")
    small = wanted[scale].copy()
    small[3, 1] = 2.0**-14
    small[4, 0] = -(2.0**-14)
    save_file(wanted | {scale: small}, folder / "model.safetensors")
    assert compared(folder, export, {scale: small}).problems_of([scale]) == []
    small[3, 1] = 2.0**-15
    save_file(wanted | {scale: small}, folder / "model.safetensors")
    said = f"{scale}[3, 1] is a scale of {small[3, 1]}, less than {2.0**-14}"
    others = wanted | {codes: wanted[codes] + 1, scale: wanted[scale] * 2}
    assert compared(folder, export, {scale: small}).problems_of([scale]) == [said]
    found = compared(folder, export, others, with_codes=False)
    assert found.problems_of(found.names) == [said]
    known = {n: v for n, v in wanted.items() if not re.search(r"weight_(packed|scale|shape)$", n)}
    size = sum(value.nbytes for value in known.values())
    assert found.words(found.names) == (
        f"{len(known)} tensors, {size / 1e3:.1f} kB, bit for bit as planned"
    )
    norm = compared(folder, export, {NORM: wanted[NORM] * 2}, with_codes=False)
    assert "[0] is " in norm.problems_of([NORM])[0]


def test_an_index_and_shards_must_be_whole(stored):
    export, wanted, folder = stored("ragged-bf16")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(wanted, "model-00001-of-00002.safetensors")}
    index["weight_map"][UP] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        TensorComparison(folder, export)
    assert "shard model-00002-of-00002.safetensors is missing" in str(caught.value)
    index["weight_map"][UP] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert TensorComparison(folder, export).names == frozenset(wanted)
    del index["weight_map"][UP]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="does not name 1 tensor"):
        TensorComparison(folder, export)


@pytest.fixture
def written(base, tmp_path) -> tuple[Path, Export]:
    """The files beside the weights, as an export writes them."""
    export, folder = export_of(base, "ragged-bf16"), tmp_path / "written"
    folder.mkdir()
    for path in (base / "tokenizer.json", base / "vocab.txt", *export.code_files.values()):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(export.config))
    return folder, export


def test_files_are_those_of_the_base_and_of_the_export_and_notes_are_free(base, written):
    folder, export = written
    assert content.file_problems(folder, export) == []
    assert content.not_copied(base) == "; only the base has notes.txt"
    (base / "notes.txt").rename(folder / "LICENSE")
    assert content.not_copied(base) == ""
    (folder / "LICENSE").rename(base / "notes.txt")
    for free in ("README.md", "model.safetensors.index.json", "rounding.json", ".hidden.py",
                 ".git/config.json", "figure.png"):  # fmt: skip
        (folder / free).parent.mkdir(exist_ok=True)
        (folder / free).write_text("{}")
    assert content.file_problems(folder, export) == []
    (folder / "tokenizer.json").write_text('{"version": 2}')  # as long as it was
    (folder / "vocab.txt").unlink()
    (folder / "sub").mkdir()
    for foreign in ("helper.py", "b.jinja", "sub/config.json", "sub/.hidden.txt", "vocab.model"):
        (folder / foreign).write_text("")
    assert content.file_problems(folder, export) == [
        f"tokenizer.json is not that of {base / 'tokenizer.json'}",
        "vocab.txt is missing",
        *(f"{name} is not part of the export"
          for name in ("b.jinja", "helper.py", "sub/config.json", "vocab.model")),
    ]  # fmt: skip


def test_config_json_is_compared_key_by_key_as_json_has_it(written):
    folder, export = written

    def problems(**changes):
        config = {k: v for k, v in (export.config | changes).items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(config, indent=7, sort_keys=True))
        return content.config_problems(folder, export)

    assert problems() == []
    assert problems(hidden_size=64.0, vocab_size=..., more=True) == [
        "config.json says hidden_size=64.0, not 64",
        "config.json says more=true, not nothing",
        "config.json says vocab_size=nothing, not 100",
    ]
    # Values in quotes of up to 80 characters are shown, of longer ones 77 and an ellipsis.
    assert problems(a="x" * 78) == [f'config.json says a="{"x" * 78}", not nothing']
    assert problems(a="x" * 79) == [f'config.json says a="{"x" * 76}..., not nothing']
    (folder / "config.json").write_text("[")
    (problem,) = content.config_problems(folder, export)
    assert "config.json" in problem
    assert problem in content.file_problems(folder, export)


def test_five_problems_are_named_and_the_others_counted():
    assert content.in_words([]) == ""
    assert content.in_words(list("abcde")) == "a; b; c; d; e"
    assert content.in_words(list("abcdefg")) == "a; b; c; d; e; and 2 more"
