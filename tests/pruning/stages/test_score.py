"""What is noted beside statistics is read by type before anything is planned on it."""

import json
import shutil

import pytest

from tests.support.command import given, refused, run


@pytest.fixture(scope="module")
def scored(models, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "out"
    assert run("--quiet", "score", models / "single", *given(texts, out)) == 0
    return out


def without(name: str):
    return lambda noted: noted["sources"][0].pop(name)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("sources", lambda noted: noted.update(sources=7)),
        ("sources", lambda noted: noted["sources"].append(1)),
        ("sources", lambda noted: noted["sources"][0].update(tokens=[1])),
        *[("sources", without(name)) for name in ("path", "sha256", "weight", "documents")],
        ("stability", lambda noted: noted.update(stability="good")),
        ("stability", lambda noted: noted["stability"].update(tokens=[None])),
    ],
)
def test_notes_of_other_types_are_refused(scored, tmp_path, capsys, name, damage):
    out = shutil.copytree(scored, tmp_path / "out")
    noted = json.loads((out / "statistics.json").read_text())
    damage(noted)
    (out / "statistics.json").write_text(json.dumps(noted))
    message = refused(capsys, out, "plan", out, "--prune-rate", 0.5)
    assert f"{name} in {out / 'statistics.json'} hold something else; remove it" in message


def test_scoring_again_refuses_them_too(scored, models, texts, tmp_path, capsys):
    out = shutil.copytree(scored, tmp_path / "out")
    noted = json.loads((out / "statistics.json").read_text())
    (out / "statistics.json").write_text(json.dumps({**noted, "sources": 7}))
    assert run("--quiet", "score", models / "single", *given(texts, out)) == 2
    assert "sources in" in " ".join(capsys.readouterr().err.split())
