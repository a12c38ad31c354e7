"""What a command read of each text file is said before the work, and kept with what it made."""

import gzip
import json

import yaml

from tests.support import command

WORDS = "The quick brown fox jumps over the lazy dog. "


def write(folder):
    rows = [{"question": f"{n}?", "answer": WORDS * 3} for n in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"question": "", "answer": None}])
    (folder / "maths.json.gz").write_bytes(gzip.compress(lines.encode()))
    code = [{"text": f"def f{n}(): return {n}\n" * 9} for n in range(20)]
    (folder / "code.json").write_text(json.dumps(code, indent=1))
    (folder / "wiki.csv").write_text("id,body\n" + f'1,"{WORDS * 9}"\n' * 2)


def test_a_run_says_and_keeps_what_it_read_of_each_file(models, tmp_path, capsys):
    write(tmp_path)
    out, maths = tmp_path / "out", tmp_path / "maths.json.gz"
    capsys.readouterr()
    assert command.run(
        "compress", models / "single", "--output", out, "--batch", 4, "--bits", 16,
        "--planner", "fair", "--window", 64, "--max-tokens", 1000,
        "--calibration", f"{maths}=0.75:template="
        r"Q: {question}\nA: {answer}", f"{tmp_path}/code.json=0.25",
        "--evaluation", f"{tmp_path}/wiki.csv:field=body",
    ) == 0  # fmt: skip
    said = capsys.readouterr().err
    before = said[: said.index("score ")]
    for line in (
        f"{maths}: JSON lines in gzip, template 'Q: {{question}}\\nA: {{answer}}', ",
        "(1 of 21 rows hold no text): 'Q: ",
        f"{tmp_path}/code.json: JSON, field 'text', ",
        f"{tmp_path}/wiki.csv: CSV, field 'body', 2 documents read: {(WORDS * 9)[:80]!r}",
    ):
        assert line in before
    report = json.loads((out / "report.json").read_text())
    first, second = report["calibration"]["sources"]
    assert (first["tokens"], second["tokens"]) == (750, 250)
    assert first["format"] == "JSON lines in gzip" and first["weight"] == 0.75
    assert first["field"] == "Q: {question}\nA: {answer}" and first["begins"].startswith("Q: ")
    assert first["lacking"] == "1 of 21 rows hold no text"
    assert (second["format"], second["field"]) == ("JSON", "text") and "lacking" not in second
    assert second["begins"].startswith("def f") and len(second["begins"]) == 80
    (measured,) = report["evaluation"]["sources"]
    assert (measured["format"], measured["field"]) == ("CSV", "body")
    # The card's recipe reads the same text.
    card = (out / "exports/ragged-bf16/README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["calibration"] == [
        r'maths.json.gz=0.75:template="Q: {question}\nA: {answer}"', "code.json=0.25",
    ]  # fmt: skip
    assert recipe["evaluation"] == ["wiki.csv:field=body"]


def test_measuring_says_what_it_reads(models, tmp_path, capsys):
    write(tmp_path)
    capsys.readouterr()
    words = f"{tmp_path}/wiki.csv:field=body"
    assert command.run("eval", models / "single", "--text", words, "--window", 64) == 0
    assert "wiki.csv: CSV, field 'body', 2 documents read: 'The quick" in capsys.readouterr().err
    for text, why in (("wiki.csv", "name the right field"), ("code.json=2", "has a weight")):
        said = command.refused(
            capsys, tmp_path, "eval", models / "single", "--text", tmp_path / text
        )
        assert why in said
