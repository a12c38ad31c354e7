"""The command of a report, read by the command line, is the recipe that it came from."""

import dataclasses
import json
import shlex

import pytest

from pruning.cli.flags import recipe_from
from pruning.cli.main import build_parser
from pruning.recipe.recipe import CompressionRecipe
from pruning.report.command import command_line

RECIPES = [
    {},
    {"calibration": ("a text.txt=0.5", "b.jsonl"), "evaluation": ("it's.txt",), "gradients": True},
    {"prune_rate": 0.5, "export": ("padded-int4", "ragged-bf16"), "quantizer": "gptq", "seed": 3},
    {"target_bytes": 6_000_000_000, "width": "capped", "cap": 64, "until_stable": 0.98},
    {"skip_layers": (0, 3), "layer_rate": ("2=0.5",), "overwrite": True, "rho_max": 0.9},
]


@pytest.mark.parametrize("options", RECIPES)
def test_the_command_line_makes_the_same_recipe(options):
    recipe = CompressionRecipe(model="my model", output="$out", **options)
    # through JSON, as in a report
    said = command_line(json.loads(json.dumps(dataclasses.asdict(recipe))))
    program, *arguments = shlex.split(said)
    assert program == "moe-compress" and arguments[:2] == ["compress", "my model"]
    assert recipe_from(build_parser().parse_args(arguments)) == recipe


def test_only_what_differs_from_the_defaults_is_said():
    recipe = CompressionRecipe(model="demo", output="out", max_tokens=8192)
    said = command_line(dataclasses.asdict(recipe))
    assert said == "moe-compress compress demo --output out --max-tokens 8192"
