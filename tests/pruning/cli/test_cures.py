"""What a refusal advises is done, in its own words, and then works."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.command import SIZES, given, refused, run

# Words of a cure: (what is looked for, what it does to the flags that were given).
CURES = (
    (r"(?:choose|or) (--[a-z0-9-]+) ([\w-]+)", lambda flags, name, value: flags | {name: value}),
    (r"add (--[a-z-]+)", lambda flags, name: flags | {name: None}),
    (r"leave (--[a-z-]+) away", lambda flags, name: {k: v for k, v in flags.items() if k != name}),
    (r"export with (--bits) (16)", lambda flags, name, value: flags | {name: value}),
)


def words(flags: dict) -> list:
    return [word for flag in flags.items() for word in flag if word is not None]


def followed(flags: dict, shown: str) -> list[dict]:
    """The flags after each of the cures that a message names."""
    found = [
        change(flags, *match)
        for pattern, change in CURES
        for match in (m.groups() for m in re.finditer(pattern, shown))
    ]
    assert found, shown
    return found


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """Models by name: the usual one, one whose shared expert fits no group, one of odd experts,
    gpt-oss, and one stored in 4 bits."""
    from tests.pruning.runs.test_native import kimi

    folder = tmp_path_factory.mktemp("cures")
    uneven = SIZES | {"shared_expert_intermediate_size": 24}
    tiny.add_tokenizer(tiny.tiny_qwen2_moe(folder / "uneven", **uneven))
    oss = tiny.tiny_model("gpt_oss", vocab_size=300, hidden_size=64, intermediate_size=64)
    tiny.add_tokenizer(tiny.save(oss, folder / "oss"))
    (folder / "four").mkdir()
    return {"usual": models / "single", "uneven": folder / "uneven", "oss": folder / "oss",
            "native": kimi(folder / "four")}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags", "cures"),
    [
        ("usual", {"--group-size": 128}, 1),
        ("usual", {"--group-size": 64}, 1),
        ("uneven", {}, 1),
        ("usual", {"--block": 16}, 1),
        ("usual", {"--grid": 64}, 2),
        ("usual", {"--window": 4096}, 1),
        ("usual", {"--bits": 16, "--export": "ragged-int4"}, 1),
        ("usual", {"--bits": 8}, 1),
        ("usual", {"--export": "padded-fp8"}, 1),
        ("oss", {"--export": "padded-mxfp4", "--group-size": 64}, 1),
        ("native", {"--quantizer": "gptq"}, 2),
        ("native", {"--repair": "layer"}, 2),
        ("native", {"--group-size": 64}, 2),
    ],
    ids=lambda value: " ".join(map(str, words(value))) if isinstance(value, dict) else None,
)
def test_options_that_contradict_something_are_refused_with_a_cure_that_cures(
    made, capsys, tmp_path, monkeypatch, model, flags, cures
):
    monkeypatch.chdir(tmp_path)
    asked = ("estimate", made[model], "--no-probe", "--prune-rate", 0)
    shown = refused(capsys, tmp_path, *asked, *words(flags))
    advised = followed(flags, shown)
    assert len(advised) == cures, shown
    for better in advised:
        if run(*asked, *words(better)):  # what it asked for instead has a cure of its own
            (better,) = followed(better, capsys.readouterr().err)
        assert run(*asked, *words(better)) == 0, (shown, capsys.readouterr().err)


def test_a_command_that_comes_too_early_names_the_one_before_it(models, texts, tmp_path, capsys):
    out, done = tmp_path / "out", []
    calls = {
        "score": (models / "single", *given(texts, out), "--bits", 16),
        "plan": (out, "--prune-rate", 0.5),
        "export": (out, "--export", "ragged-bf16"),
        "verify": (out,),
    }
    (tmp_path / "empty").mkdir()
    for asked in ("plan", "export", "verify"):
        capsys.readouterr()
        folder = out if done else tmp_path / "empty"
        assert run("--quiet", asked, folder, *calls[asked][1:]) == 2
        shown = re.sub(r"\s+", " ", capsys.readouterr().err)
        (advised,) = re.findall(r"`moe-compress (\w+)`", shown)
        assert run("--quiet", advised, *calls[advised]) == 0
        done.append(advised)
    assert done == ["score", "plan", "export"]
    assert run("--quiet", "verify", out) == 0
    # A folder that is there is replaced as it is said.
    shown = refused(capsys, out, "export", *calls["export"])
    (flag,) = re.findall(r"add (--\w+)", shown)
    assert run("--quiet", "export", *calls["export"], flag) == 0


def test_what_was_not_collected_is_collected_by_the_flags_that_are_named(
    models, texts, tmp_path, capsys
):
    out, flags = tmp_path / "out", []
    score = ("--quiet", "score", models / "single", *given(texts, out), "--bits", 16)
    wanted = [("--criterion", "taylor"), ("--criterion", "wanda"), ("--criterion", "wg"),
              ("--attribution", "nll_ig"), ("--attribution", "nll_ablate"),
              ("--attribution", "nll_grad2"), ("--emptied", "mean"),
              ("--planner", "paper", "--layer-loss", "nll_ig")]  # fmt: skip
    assert run(*score) == 0
    for asked in wanted:
        capsys.readouterr()
        assert run("--quiet", "plan", out, "--prune-rate", 0.5, *asked) == 2
        shown = re.sub(r"\s+", " ", capsys.readouterr().err)
        (said,) = re.findall(r"with (--[a-z0-9-]+(?: \d+)?)", shown)
        flags += [word for word in said.split() if word not in flags]
    assert run(*score, *flags) == 2  # those options are others than the folder's
    (more,) = re.findall(r"add (--\w+)", capsys.readouterr().err)
    assert run(*score, *flags, more) == 0
    for asked in wanted:
        assert run("--quiet", "plan", out, "--prune-rate", 0.5, *asked) == 0


def test_extras_that_refusals_name_exist():
    root, named = Path(__file__).parents[3], set()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for path in (root / "pruning").rglob("*.py"):
        named |= set(re.findall(r"pip install 'moe-jax\[(\w+)\]'", path.read_text()))
    assert named and named <= project["optional-dependencies"].keys()
