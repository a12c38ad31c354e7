"""Every option that is a number, on the command line and in a recipe, with numbers that are none of
its range: refused by name before any work."""

import argparse
import dataclasses
import typing

import pytest
import yaml

from moe_jax.errors import InputError
from pruning.cli.grammar import build_parser
from pruning.recipe.group import kinds
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from tests.support.command import run, snapshot

# Nowhere a size, a rate, a share, a seed or a layer.
WRONG = ("nan", "inf", "-inf", "1e999", str(2**63), str(2**70), "9" * 5000, "-1", "1e30")
OWN = {"model": "m", "output": "o"}
# What has a suffix or a form of its own.
MORE = ("target_bytes", "target_parameters", "memory_limit", "layer_rate")


def is_number(action: argparse.Action) -> bool:
    if action.dest in MORE:
        return True
    try:
        return isinstance(action.type("4"), int | float) if callable(action.type) else False
    except argparse.ArgumentTypeError:
        return False


def numeric_flags() -> list[tuple[str, str]]:
    return sorted(
        (command, flag)
        for command, parser in build_parser().commands.items()
        for flag, action in parser.flags().items()
        if is_number(action)
    )


def numeric_fields() -> list[str]:
    def types(kind) -> set:
        inner = [one for part in typing.get_args(kind) for one in types(part)]
        return {kind, *inner, *(type(part) for part in typing.get_args(kind))}

    return [name for name, kind in kinds(CompressionRecipe).items()
            if types(kind) & {int, float} or name in MORE]  # fmt: skip


def test_there_are_numbers_in_every_group():
    flags = {flag for command, flag in numeric_flags() if command == "compress"}
    fields = {"--" + name.replace("_", "-") for name in numeric_fields()}
    assert flags == fields | {"--processes", "--process-id"} and len(flags) == 26
    assert ("audit", "--sample-tokens") in numeric_flags()
    assert ("estimate", "--tensor-parallel") in numeric_flags()


@pytest.mark.parametrize(("command", "flag"), numeric_flags())
def test_a_flag_refuses_them_before_any_work(
    scored, models, texts, tmp_path, capsys, command, flag
):
    folder = (scored,)
    model = (models / "single", "--output", tmp_path / "out")
    text = ("--calibration", texts / "good.txt")
    given = {
        "plan": folder, "export": folder, "verify": folder,
        "eval": (*folder, "--text", texts / "good.txt"),
        "apply": (scored, *model), "estimate": (models / "single",),
        "recover": (scored, *model[1:], "--text", texts / "good.txt"),
    }.get(command, (*model, *text))  # fmt: skip
    more = {"--cap": ("--width", "capped"), "--expert-rate": ("--width", "combined")}.get(flag, ())
    before = snapshot(scored)
    for word in (f"3={w}" for w in WRONG) if flag == "--layer-rate" else WRONG:
        capsys.readouterr()
        try:
            code = run(command, *given, f"{flag}={word}", *more)
        except SystemExit as error:
            code = error.code
        shown = capsys.readouterr().err
        assert code == 2 and "Traceback" not in shown, (word, shown)
        names = {flag, flag[2:].replace("-", "_"), "layer_rate"}
        names |= {"tokens"} if command == "audit" else {"evaluation_tokens"}
        assert any(name in shown for name in names), (word, shown)
        assert "check weights" not in shown and len(shown) < 20_000
    assert snapshot(scored) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", numeric_fields())
def test_a_recipe_refuses_them(tmp_path, name):
    path = tmp_path / "recipe.yaml"
    is_list = typing.get_origin(kinds(CompressionRecipe)[name]) is tuple
    more = {"cap": {"width": "capped"}, "expert_rate": {"width": "combined"}}.get(name, {})
    numbers = (".nan", ".inf", "-.inf", "1.0e+999", str(2**63), str(2**70), "9" * 5000, "-1", "[]")
    for word in (f"3={w}" for w in WRONG) if name == "layer_rate" else numbers:
        text = f"[{word}]" if is_list else word
        path.write_text(yaml.safe_dump({**OWN, **more}) + f"{name}: {text}\n")
        if name == "skip_layers" and word in (str(2**63), str(2**70)):
            continue  # a layer that no model has, which is known once there is one
        with pytest.raises(InputError, match=f"{name}|layer_rate|integer string"):
            load_recipe(path)


@pytest.mark.parametrize("value", [0, 0.5])
@pytest.mark.parametrize("name", numeric_fields())
def test_zero_and_a_half_are_taken_as_they_are_or_refused(name, value):
    more = {"cap": {"width": "capped"}, "expert_rate": {"width": "combined"}}.get(name, {})
    try:
        recipe = CompressionRecipe(**OWN, **more, **{name: value})
    except InputError as error:
        assert name in str(error)
    else:
        assert dataclasses.asdict(recipe)[name] == value
