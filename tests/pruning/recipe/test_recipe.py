"""Options mean the same from the command line, YAML and Python, and wrong ones are named."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from convert.export_format import FLOAT8, FORMATS, GROUP_SIZES
from moe_jax.errors import InputError
from pruning.cli.flags import recipe_from
from pruning.cli.main import build_parser
from pruning.recipe.recipe import CompressionRecipe, load_recipe

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
maybe = st.none() | st.integers(2, 512)
recipes = st.builds(
    CompressionRecipe,
    model=text,
    output=text,
    calibration=st.lists(text, max_size=3),
    evaluation=st.lists(text, max_size=3),
    max_tokens=st.integers(1, 10**9),
    window=maybe,
    prune_rate=st.floats(0, 1, exclude_max=True),
    bits=st.sampled_from([4, 8, 16]),
    group_size=st.none() | st.sampled_from(GROUP_SIZES),
    width=st.sampled_from([None, "free", "uniform"]),
    block=maybe,
    minimum=maybe,
    gradients=st.booleans(),
    export=st.lists(st.sampled_from(FORMATS), unique=True),
    seed=st.integers(0, 2**32),
    overwrite=st.booleans(),
)


@given(recipe=recipes)
def test_a_recipe_survives_its_yaml(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [("6GB", 6 * 10**9), ("500 mb", 5 * 10**8), ("1.5G", 15 * 10**8), ("1e3", None), ("7", 7)],
)
def test_a_size_has_a_suffix_or_none(text, value):
    if value is None:
        with pytest.raises(ValueError, match="such as 6GB"):
            CompressionRecipe(model="m", output="o", target_bytes=text)
    else:
        assert CompressionRecipe(model="m", output="o", target_bytes=text).target_bytes == value


def test_a_given_target_replaces_the_rate_of_the_file(tmp_path):
    path = written(tmp_path, prune_rate=0.5)
    recipe = load_recipe(path, target_parameters="3B")
    assert recipe.prune_rate is None and recipe.target_parameters == 3 * 10**9


def written(folder: Path, **values) -> Path:
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump({"model": "demo", "output": "out"} | values))
    return path


def parsed(*arguments) -> CompressionRecipe:
    return recipe_from(build_parser().parse_args([*map(str, arguments)]))


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = written(tmp_path, prune_rate=0.5, bits=16, calibration=["a", "b"], seed=3)
    recipe = parsed("compress", "--recipe", path, "--prune-rate", "0", "--calibration", "c=2")
    assert recipe == CompressionRecipe(
        model="demo", output="out", prune_rate=0.0, bits=16, calibration=("c=2",), seed=3
    )
    assert parsed("score", "other", "--recipe", path, "--output", "there").model == "other"


def test_every_field_has_a_flag_that_sets_it():
    values = {
        "model": "m", "output": "o", "calibration": ("a", "b"), "calibration_field": "body",
        "first_tokens": True, "loss_on": "answers", "evaluation": ("e",), "evaluation_tokens": 11,
        "max_tokens": 5, "window": 6, "prune_rate": 0.5, "bits": 16,
        "group_size": 64, "quantizer": "gptq", "criterion": "x", "attribution": "y",
        "planner": "z", "weights": "mass", "rho_max": 0.5, "layer_loss": "attribution",
        "smoothing": "huber", "passes": 4,
        "align": "hull", "per_layer": True, "width": "capped", "cap": 9, "block": 7,
        "grid": 7, "requantize": True, "repair": "expert",
        "minimum": 8, "keep_experts": True, "emptied": "mean",
        "layer_rate": ("3=0.5", "4=0"), "skip_layers": (1, 2),
        "gradients": True,
        "expert_details": True, "weight_gradients": True, "obs": True,
        "export": ("padded-bf16", "ragged-bf16"), "until_stable": 0.5, "batch": 9,
        "mtp": "keep",
        "nll_ig": 4, "nll_ablate": True, "nll_grad2": True, "dtype": "bfloat16", "seed": 10,
        "overwrite": True, "scratch": "big-disk", "memory_limit": 1_500_000_000,
    }  # fmt: skip
    alone = [("expert_rate", 0.5, ["--width", "combined"]), ("target_bytes", 6 * 10**9, []),
             ("target_parameters", 7, []), ("target_factor", 5.27, []),
             ("weights_only", True, []), ("cut_router", True, []),
             ("top_k", 2, ["--cut-router"])]  # fmt: skip
    for name, value, needed in alone:
        flag = "--" + name.replace("_", "-")
        given = parsed(
            "compress", "m", "--output", "o", flag, *(() if value is True else (value,)), *needed
        )
        assert getattr(given, name) == value
        values[name] = getattr(CompressionRecipe(model="m", output="o"), name)
    arguments: list = ["compress", values["model"]]
    for field in dataclasses.fields(CompressionRecipe):
        if field.name not in ("model", *(name for name, *_ in alone)):
            value = values[field.name]
            given = () if value is True else value if isinstance(value, tuple) else (value,)
            arguments += ["--" + field.name.replace("_", "-"), *given]
    assert dataclasses.asdict(parsed(*arguments)) == values
    assert not parsed("compress", "m", "--output", "o", "--no-first-tokens").first_tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"prune_rates": 0.5},
            r"option='prune_rates' is unknown; did you mean 'prune_rate'\? choose one of: model,",
        ),
        ({"prune_rate": "abc"}, r"prune_rate='abc' must be a number"),
        ({"prune_rate": True}, r"prune_rate=True must be a number"),
        ({"prune_rate": 1}, r"prune_rate=1.0 must lie in \[0, 1\)"),
        ({"prune_rate": -0.1}, r"prune_rate=-0.1 must lie in \[0, 1\)"),
        ({"prune_rate": float("nan")}, r"prune_rate=nan must lie in \[0, 1\)"),
        (
            {"prune_rate": [0.25, 0.5]},
            r"prune_rate=\[0.25, 0.5\] must be a number; `moe-compress plan` and `eval` take sever",
        ),
        ({"bits": "4"}, r"bits='4' is unknown; choose among 4, 8, 16"),
        ({"bits": 6}, r"bits=6 is unknown; choose among 4, 8, 16"),
        ({"bits": True}, r"bits=True is unknown"),
        ({"export": "ragged-int4"}, r"export='ragged-int4' must be a list; write \[ragged-int4\]"),
        ({"export": ["padded-nf4"]}, r"is unknown; bitsandbytes NF4 is not written, because"),
        ({"export": ["ragged-int5"]}, r"export='ragged-int5' is unknown; .* 'ragged-int4'"),
        ({"export": ["ragged-int4"] * 2}, r"must name each format once"),
        ({"calibration": "a.txt"}, r"calibration='a.txt' must be a list; write \[a.txt\]"),
        ({"calibration": [3]}, r"calibration=3 must be text"),
        ({"max_tokens": 1.5}, r"max_tokens=1.5 must be a whole number"),
        ({"max_tokens": 0}, r"max_tokens=0 must be at least 1"),
        ({"batch": None}, r"batch=None must be a whole number"),
        ({"window": 1}, r"window=1 must be at least 2"),
        ({"block": 0}, r"block=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be at least 0"),
        ({"group_size": 48}, r"group_size=48 must be one of \(128, 64, 32\)"),
        ({"overwrite": "no"}, r"overwrite='no' must be true or false"),
        ({"gradients": 1}, r"gradients=1 must be true or false"),
        ({"width": "narrow"}, r"width='narrow' is unknown; choose among 'free', 'capped', 'l"),
        ({"target_bytes": "6 pounds"}, r"target_bytes='6 pounds' must be a number with or without"),
        ({"target_bytes": "6GB", "prune_rate": 0.5}, r"prune_rate=0.5, target_bytes=6000000000 ex"),
        ({"layer_rate": ["3"]}, r"layer_rate='3' must be LAYER=RATE"),
        ({"layer_rate": ["3=1.5"]}, r"layer_rate='3=1.5' must be LAYER=RATE with a rate in"),
        ({"layer_rate": ["3=0.5"], "skip_layers": [3]}, r"names layer 3 twice"),
        ({"width": "capped"}, r"width='capped' needs a cap"),
        ({"cap": 8}, r"cap=8 needs width='capped', not None"),
        ({"expert_rate": 0.5}, r"expert_rate=0.5 needs width='combined'"),
        ({"rho_max": 0}, r"rho_max=0.0 must lie in \(0, 1\]"),
        (
            {"weights_only": True, "calibration": ["a"], "nll_ig": 2},
            r"weights_only reads no calibration text, which calibration=\('a',\), nll_ig=2 needs",
        ),
        ({"weights_only": True, "quantizer": "gptq"}, r"which quantizer='gptq' needs; leave out"),
        ({"model": ""}, r"model='' must name a folder"),
    ],
)
def test_a_wrong_value_in_yaml_is_named_with_what_is_expected(tmp_path, values, message):
    with pytest.raises(ValueError, match=rf"given\.yaml: .*{message}"):
        load_recipe(written(tmp_path, **values))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [", "cannot be read"),
        # The loader in Python would take minutes of a few thousand more.
        ("a: " + "[" * 1000, "cannot be read: .*\n?.*exceeded maximum nesting depth"),
        ("output: o", "model is missing"),
        ("model: m", "output is missing"),
        ("3: m", "'?3'? is unknown"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "given.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_a_recipe_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("model: Über".encode("latin-1"))
    with pytest.raises(InputError, match=r"recipe\.yaml cannot be read: .*utf-8"):
        load_recipe(path)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml cannot be read"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_sixteen_bit_recipe_with_a_four_bit_export_contradicts_itself():
    recipe = CompressionRecipe(model="m", output="o", bits=16, export=("ragged-int4",))
    with pytest.raises(ValueError, match=r"bits=16 contradicts export=\['ragged-int4'\]"):
        recipe.resolved(128, 128, 64)


@pytest.mark.parametrize("export", [name for name in FORMATS if name != FLOAT8])
@pytest.mark.parametrize("bits", [4, 16])
def test_resolving_fills_every_default_and_is_idempotent(export, bits):
    packed = not export.endswith("bf16")
    for exports in ((), (export,)):
        recipe = CompressionRecipe(
            model="m", output="o", bits=4 if packed else bits, export=exports
        ).resolved(96, 64, 1000)
        assert recipe.window == 1000 and recipe.group_size == 32
        assert recipe.block == recipe.minimum == 32
        policies = {"ragged": "free", "layered": "layer", "padded": "uniform"}
        assert recipe.width == policies[recipe.export[0].partition("-")[0]]
        assert recipe.export == (exports or (f"ragged-{'int4' if recipe.bits == 4 else 'bf16'}",))
        assert recipe.resolved(96, 64, 1000) == recipe
        assert (recipe.planner, recipe.criterion, recipe.attribution) == ("auto", None, None)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({}, (None, None, "auto")),
        ({"planner": "auto"}, (None, None, "auto")),
        ({"planner": "fair"}, ("shapley", "ala", "fair")),
        ({"planner": "paper", "criterion": "act"}, ("act", "ala", "paper")),
        ({"criterion": "energy"}, ("energy", "ala", "fair")),
        ({"align": "hull"}, ("shapley", "ala", "fair")),
        ({"weights": "mass"}, ("shapley", "ala", "fair")),
        ({"planner": "auto", "attribution": "reap"}, (None, "reap", "auto")),
        ({"width": "uniform", "keep_experts": True, "block": 32}, (None, None, "auto")),
        ({"weights_only": True}, ("noise", "aimer", "fair")),
        ({"weights_only": True, "criterion": "weight"}, ("weight", "aimer", "fair")),
    ],
)
def test_who_names_a_rule_gets_it_and_others_have_it_measured(given, rule):
    asked = CompressionRecipe(model="m", output="o", **given)
    recipe = asked.resolved(96, 64, 1000)
    assert (recipe.criterion, recipe.attribution, recipe.planner) == rule
    usual = recipe.fixed()
    wanted = (rule[0] or "shapley", rule[1] or "ala", rule[2].replace("auto", "fair"))
    assert (usual.criterion, usual.attribution, usual.planner) == wanted
    assert (recipe.used_criterion, recipe.used_attribution, recipe.used_planner) == wanted


def test_formats_of_several_shapes_are_planned_for_the_least_free_one():
    for exports, width in (
        (("ragged-bf16", "layered-bf16"), "layer"),
        (("layered-bf16", "padded-bf16", "ragged-bf16"), "uniform"),
    ):
        recipe = CompressionRecipe(model="m", output="o", bits=16, export=exports)
        assert recipe.resolved(96, 64, 1000).width == width


def test_help_and_wrong_options_import_no_jax_and_commands_nothing_that_few_need(tmp_path):
    """Every command's help, and a bad rate, in one process that must end without jax."""
    script = """
import contextlib, io, sys
from pruning.cli import main
commands = ["compress", "inspect", "score", "plan", "export", "apply", "verify", "eval"]
commands += ["report", "estimate", "audit", "compare", "completion"]
for arguments in ([], *([command] for command in commands)):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            main([*arguments, "--help"])
        except SystemExit as end:
            assert end.code == 0
    assert "usage: moe-compress" in shown.getvalue()
assert main(["compress", "demo", "--output", sys.argv[1], "--prune-rate", "1.5"]) == 2
heavy = {"jax", "flax", "numpy", "matplotlib", "safetensors", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
with contextlib.redirect_stdout(io.StringIO()) as shown:
    assert main(["completion", "bash"]) == 0
assert "--prune-rate" in shown.getvalue() and "jax" not in sys.modules
from pruning import PruningPlan, compress, collect_statistics, prune_layer
assert "jax" in sys.modules and callable(compress)
import pruning.cli.commands  # what draws, trains or converts waits for that, others start without
heavy = {"matplotlib", "orbax", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "prune_rate=1.5 must lie in [0, 1)" in done.stderr


def test_the_facade_has_every_name_it_promises_and_no_other():
    import pruning

    assert set(dir(pruning)) == set(pruning.__all__)
    for name in pruning.__all__:
        value = getattr(pruning, name)
        if name.isupper():  # a registry
            assert isinstance(value, dict)
        elif not isinstance(value, types.ModuleType):  # figures, by what they draw
            assert value.__name__ == {"apply": "apply_plan"}.get(name, name)
    with pytest.raises(AttributeError, match="no attribute 'kompress'"):
        _ = pruning.kompress
