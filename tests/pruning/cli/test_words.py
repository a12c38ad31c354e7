"""What is typed: help, near names, lists, switches, older spellings; no model is opened."""

import re
import subprocess
import sys

import pytest

from convert.export_format import FORMATS
from pruning.cli.flags import recipe_from
from pruning.cli.grammar import build_parser
from pruning.cli.main import main
from pruning.recipe import names
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe


def parsed(*arguments):
    return build_parser().parse_args([*map(str, arguments)])


def help_of(command: str, monkeypatch, columns: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return build_parser().commands[command].format_help()


def refusal(capsys, *arguments) -> str:
    """A command line that is not understood: exit 2, and what stderr says."""
    with pytest.raises(SystemExit, match="2"):
        main([*arguments])
    return capsys.readouterr().err


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"^  --(?:\[no-\])?([\w-]+)", text, re.M))


def test_help_stands_in_the_groups_of_the_options(monkeypatch):
    shown = help_of("compress", monkeypatch)
    titles = ["Arguments", "Recipe", "Model and output", "Text: what is scored", "Scores: what is",
              "Plan: how many", "Export: the formats", "Devices and hosts",
              "What is shown"]  # fmt: skip
    places = [shown.index(f"\n{title}") for title in titles]
    assert places == sorted(places)
    hidden = {"model", "calibration_field"}  # the one has no flag, the other another spelling
    fields = {name.replace("_", "-") for name in vars(CompressionRecipe(model="m", output="o"))
              if name not in hidden}  # fmt: skip
    fields |= {name.replace("_", "-") for name in vars(PlaceOptions())}
    assert flags_in(shown) - {"json", "quiet", "verbose", "debug", "recipe", "download"} == (
        fields | {"text-field"}
    )


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("score", {"export", "bits", "group-size", "quantizer", "mtp", "width", "align"}),
        ("estimate", {"calibration", "evaluation", "evaluation-tokens", "overwrite"}),
        ("plan", {"gradients", "export", "max-tokens", "output"}),
        ("export", {"bits", "quantizer", "prune-rate"}),
        ("eval", {"max-tokens", "evaluation", "gradients"}),
        ("audit", {"tokens", "prune-rate", "evaluation"}),
        ("compare", {"export", "criterion", "until-stable"}),
    ],
)
def test_a_command_shows_only_what_it_reads(monkeypatch, command, without):
    assert not without & flags_in(help_of(command, monkeypatch))


def test_the_values_of_a_choice_are_listed(monkeypatch):
    shown = " ".join(help_of("compress", monkeypatch).split())
    for listed in (names.CRITERIA, names.ATTRIBUTIONS, names.PLANNERS, names.WEIGHTS,
                   names.SMOOTHINGS, FORMATS):  # fmt: skip
        assert f"one of {', '.join(listed)}" in shown


@pytest.mark.parametrize("columns", [80, 200])
def test_help_fits_the_terminal_and_stays_readable(monkeypatch, columns):
    for command in build_parser().commands:
        options = help_of(command, monkeypatch, columns).partition("\nexample:")[0]
        lines = options.splitlines()[1:]  # the usage is one line that a terminal wraps
        assert max(map(len, lines)) <= min(columns, 110), command


def test_a_name_registered_from_outside_is_accepted():
    given = parsed("compress", "m", "--output", "o", "--criterion", "mine", "--planner", "ours")
    assert (recipe_from(given).criterion, recipe_from(given).planner) == ("mine", "ours")


@pytest.mark.parametrize(
    ("arguments", "usage", "message"),
    [
        (["comprss", "demo"], "COMMAND ...", "no command comprss; did you mean compress?"),
        (["compress", "demo", "--outptu", "o"], "compress MODEL", "did you mean --output?"),
        (["compress", "demo", "--out", "o"], "compress MODEL", "there is no option --out here"),
        (["plan", "out", "--bits", "4"], "plan FOLDER", "no option --bits here; compress, estim"),
        (["--output", "o", "compress"], "COMMAND ...", "options stand after the command"),
        (["compress", "m", "--width", "unifrom"], "compress MODEL", "did you mean uniform?"),
        (["compress", "m", "--batch", "x"], "compress MODEL", "--batch: 'x' is not a whole number"),
        (["compress", "m", "--prune-rate", "0.2", "0.5"], "compress MODEL",
         "--prune-rate takes one value here, several in estimate, plan, eval, compare"),
        (["compress", "--export", "ragged-int4", "demo"], "compress MODEL",
         "'demo' is unknown; choose among ragged-bf16, .* a list takes every word up to the next"),
        (["compress", "m", "--export", "padded-nf4"], "compress MODEL",
         "'padded-nf4' is unknown; bitsandbytes NF4 is not written, because transformers leaves"),
        (["plan", "--prune-rate", "0.5", "out"], "plan FOLDER", "'out' is not a number; a list"),
        (["eval", "--text", "a", "out"], "eval FOLDER", "required: FOLDER; a list takes every"),
    ],
)  # fmt: skip
def test_a_typing_error_gets_the_usage_of_its_command_and_a_cure(capsys, arguments, usage, message):
    shown = refusal(capsys, *arguments)
    first, second = shown.splitlines()[:2]
    assert first.startswith(f"usage: moe-compress {usage}"), shown
    assert re.search(message.replace("?", r"\?"), second), shown
    assert len(shown.splitlines()) == 3


def test_a_model_swallowed_by_a_list_is_found_again(capsys):
    assert main(["compress", "--output", "o", "--calibration", "a.txt", "demo"]) == 2
    shown = capsys.readouterr().err
    assert "--calibration took demo as one of its values" in shown
    assert "moe-compress compress demo --calibration ..." in shown


def test_switches_go_off_again_against_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: demo\noutput: out\ngradients: true\noverwrite: true\n")
    assert recipe_from(parsed("compress", "--recipe", path)).gradients
    off = recipe_from(parsed("compress", "--recipe", path, "--no-gradients", "--no-overwrite"))
    assert not off.gradients and not off.overwrite


def test_quiet_and_verbose_stand_anywhere():
    for words in (["--quiet", "verify", "out"], ["verify", "--quiet", "out"],
                  ["verify", "out", "--quiet"]):  # fmt: skip
        options = parsed(*words)
        assert options.quiet and not options.verbose
    assert parsed("--verbose", "verify", "out", "--quiet").verbose
    assert not parsed("verify", "out").quiet


def test_older_spellings_work_and_are_not_shown(monkeypatch):
    recipe = recipe_from(parsed("score", "m", "--output", "o", "--calibration-field", "body",
                                "--bits", 16, "--export", "padded-bf16"))  # fmt: skip
    assert recipe.calibration_field == "body" and recipe.export == ("padded-bf16",)
    assert parsed("eval", "f", "--text", "t", "--max-tokens", 7).evaluation_tokens == 7
    assert parsed("audit", "m", "--tokens", 9).sample_tokens == 9
    assert parsed("prune", "out").folder.name == "out"
    shown = build_parser().format_help()
    commands = re.findall(r"^    (\w+) ", shown, re.M)
    assert "prune" not in commands and "export" in commands


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_flags_and_values(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("compress", "audit", "prune-rate", "shapley", "ragged-int4"):
        assert word in script
    assert "calibration-field" not in script


def test_bash_completes(tmp_path):
    """The script in a real shell: what a tab press offers."""
    script = subprocess.run(
        [sys.executable, "-m", "pruning", "completion", "bash"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ask = """
COMP_WORDS=(moe-compress %s); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
$(complete -p moe-compress | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}
"""
    for typed, offered in (("com", "compress"), ("plan o --plan", "--planner"),
                           ("compress m --width unif", "uniform")):  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", script + ask % typed], capture_output=True, text=True, cwd=tmp_path
        )
        assert offered in done.stdout.split(), (typed, done)
