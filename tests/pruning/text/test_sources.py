"""What is read of each file: fields and templates, on the command line, in YAML and in Python."""

import json
import re

import pytest
import yaml

from moe_jax.errors import InputError
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.text.calibration import calibration_batch
from pruning.text.documents import open_documents
from pruning.text.source import TextSource, without_folders

SETS = {
    "evol.jsonl": [{"instruction": f"Add {n}.", "output": f"x + {n}"} for n in range(50)],
    "xlam.json": [{"query": f"Rain in {n}?", "answers": [{"a": "é"}], "id": n} for n in range(50)],
}  # fmt: skip


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in SETS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(json.dumps(rows) if name.endswith("json") else lines)
    return tmp_path


def read(words: str, field: str = "text") -> list[str]:
    return sorted(open_documents(TextSource.parse(words, field), 10**6).texts)


def test_the_mix_of_fields_and_templates_is_the_joined_text(sets):
    given = ["evol.jsonl=0.51:field=output", r"xlam.json=0.24:template={query}\n{answers}"]
    sources = [TextSource.parse(words) for words in given]
    assert [source.weight for source in sources] == [0.51, 0.24]
    wanted = [sorted(row["output"] for row in SETS["evol.jsonl"]),
              sorted(f'{row["query"]}\n[{{"a": "é"}}]' for row in SETS["xlam.json"])]  # fmt: skip
    assert [read(words) for words in given] == wanted
    batch = calibration_batch(sources, lambda t: [*map(ord, t)], length=8, max_tokens=300)
    notes = batch.sources
    assert [note["field"] for note in notes] == ["output", "{query}\n{answers}"]
    assert [note["tokens"] for note in notes] == [204, 96]
    assert [note["options"] for note in notes] == [
        ':field="output"', r':template="{query}\n{answers}"',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("nowhere", TextSource("nowhere", "body")),
        ("nowhere=2.5", TextSource("nowhere", "body", 2.5)),
        ("nowhere:field=output", TextSource("nowhere", "output")),
        (r"a=2:template={b}\n{c}", TextSource("a", "body", 2.0, "{b}\n{c}")),
        (r'a:template="{b}\n\"{c}\""', TextSource("a", "body", 1.0, '{b}\n"{c}"')),
        (r"a:template={b}\\n\t:{c}", TextSource("a", "body", 1.0, "{b}\\n\t:{c}")),
        ("a:template=Q: {b}\nA: {c}:format=prose",
         TextSource("a", "body", 1.0, "Q: {b}\nA: {c}", "prose")),
        ('a:template="{b}:field=x"', TextSource("a", "body", 1.0, "{b}:field=x")),
    ],
)  # fmt: skip
def test_words_are_understood_and_written_back(words, wanted):
    found = TextSource.parse(words, "body")
    assert vars(found) == {**vars(wanted), "path": type(found.path)(wanted.path)}
    again = TextSource.parse(f"{found.path}={found.weight}{found.options}", "body")
    assert again == found


def test_a_path_that_exists_may_hold_what_separates(sets):
    odd = sets / "lr=0.1:field=x"
    odd.mkdir()
    for name in ("a=b.jsonl", "a:template={text}.jsonl", "a=2"):
        (odd / name).write_text('{"text": "t", "other": "o"}\n')
        path = f"lr=0.1:field=x/{name}"
        assert read(path) == ["t"]
        assert read(f"{path}=3:field=other") == ["o"]
        assert TextSource.parse(f"{path}=3:field=other").weight == 3.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a:field=b:template={c}", "names a field and a template; write one of them"),
        ("a:field=", "field is empty"),
        ("a:template=plain", "template='plain' names no field"),
        (r'a:template="{b}\x"', "is no JSON string"),
        ("a:format=csv", "only format=prose can be asked for"),
        ("a:feild=b", "must be a positive number; write FILE or FILE=2.5, or FILE:field=NAME"),
        ("a=0:field=b", "must be a positive number"),
    ],
)
def test_words_that_are_not_understood_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        TextSource.parse(words)


def test_a_template_has_fields_and_nothing_else_of_format(sets):
    (sets / "a").write_text('{"b": "x", "c": null, "d": 1.5, "e f": "y", "b.real": "z"}\n')
    assert read("a:template={b}|{c}|{d}|{e f}|{b.real}|{{b}}") == ["x||1.5|y|z|{b}"]
    for template in ("{b.__class__}", "{b[0]}", "{b!r}", "{b:>9}", "{0}", "{nothing}"):
        with pytest.raises(InputError, match=r"has no field .* \(found: b, c, d, e f, b\.real\)"):
            read(f"a:template={template}")
    (sets / "n").write_text('{"b": null, "c": ""}\n{"b": "x", "c": null}\n')
    assert read("n:template={b}-{c}") == ["x-"]


def test_the_cure_of_a_missing_field_cures(sets):
    with pytest.raises(InputError, match=r"evol\.jsonl:1 has no text.*output\)") as refused:
        read("evol.jsonl")
    advised = re.findall(r"(evol\.jsonl:\w+=\S+?)(?:,|$)", str(refused.value))
    field, template = (words.replace("'", "") for words in advised)  # as a shell does
    rows = SETS["evol.jsonl"]
    assert read(field) == sorted(row["instruction"] for row in rows)
    assert read(template) == sorted(f"{row['instruction']}\n{row['output']}" for row in rows)
    assert read("evol.jsonl:field=output") == read("evol.jsonl", "output")


def test_recipes_take_mappings_and_keep_words(tmp_path):
    entry = {"path": "b c.jsonl", "weight": 0.24, "template": "{prompt}\n{answer}"}
    values = {
        "model": "m", "output": "o", "calibration": ["a.txt", entry],
        "evaluation": [{"path": "e.csv", "field": 'the "text"'}],
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe == CompressionRecipe(**values)
    first, second = map(TextSource.parse, recipe.calibration)
    assert first == TextSource(type(first.path)("a.txt"))
    assert vars(second) | {"path": str(second.path)} == {**entry, "field": "text", "format": ""}
    assert TextSource.parse(recipe.evaluation[0]).field == 'the "text"'
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    # A shell's quotes and YAML's single ones hold the same text.
    quoted = "calibration: [{path: a, template: '{b}\\n{c}'}]\nmodel: m\noutput: o\n"
    (tmp_path / "q.yaml").write_text(quoted)
    words = load_recipe(tmp_path / "q.yaml").calibration[0]
    assert TextSource.parse(words).template == "{b}\n{c}"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"path": "a", "feild": "b"},
            "key of calibration='feild' is unknown; did you mean",
        ),
        ({"field": "a"}, "has no path; write path: FILE"),
        ({"path": "a", "weight": "much"}, "calibration: weight='much' must be a number"),
    ],
)
def test_mappings_that_are_not_understood_are_refused(entry, message):
    with pytest.raises(InputError, match=message):
        CompressionRecipe(model="m", output="o", calibration=(entry,))  # type: ignore[arg-type]


def test_what_travels_has_no_folders():
    assert without_folders("x/y.txt") == "y.txt"
    assert without_folders("x/y.jsonl:template={a}/{b}") == "y.jsonl:template={a}/{b}"


@pytest.mark.parametrize("words", ['a:field=""', "a:field=", "a:template="])
def test_an_option_that_says_nothing_is_refused(words):
    with pytest.raises(InputError, match=rf"{words.partition('=')[0][2:]} is empty; write"):
        TextSource.parse(words, "body")


def test_a_single_quote_character_is_a_name():
    assert TextSource.parse('a:field="', "body").field == '"'
