"""Careless changes to the library, and whether the tests likely to see them do.

Mutants are those of cosmic-ray (`pip install cosmic-ray`); its own runner would start Python, jax
and pytest anew for each, so a fork of one warm process runs the tests here, with the mutated source
served to the import system and the files untouched.

  nice python tests/bench/mutants.py pruning/budget/planners.py --sample 40
  nice python tests/bench/mutants.py 'pruning/budget/*' 'pruning/text/*' --sample 30 --seed 1
  python tests/bench/mutants.py --table            # of all that is known, without running any

A sample takes a place in the source at random and one mutant there. Outcomes are kept in --results
by the mutated source, so that a run goes on where another ended; --retry tries those again that
survived, of whatever sample. The table counts what is known of each module as it is now, all
samples together. Mutants that no test could kill stand with their reason in
mutants_equivalent.txt.
"""

import argparse
import ast
import contextlib
import difflib
import fnmatch
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import runpy
import shlex
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
RESULTS = Path(tempfile.gettempdir()) / f"moe-jax-mutants-{os.getuid()}.jsonl"
WARM = ("chex", "flax.nnx", "hypothesis.extra.numpy", "matplotlib.figure", "numpy", "optax",
        "pytest", "rich.progress", "rich.table", "safetensors.numpy", "tokenizers", "torch",
        "transformers.models.qwen2_moe.modeling_qwen2_moe", "yaml")  # fmt: skip
WAIT = 8  # seconds that a mutant may take for one of computing, where it waits or is made to
MEMORY = 16 << 30  # bytes of address space beyond which a mutant counts as killed

# What replaces an operator of arithmetic or comparison: near kin, which run where others only fail.
KIN = {
    "Add": "Sub", "Sub": "Add", "Mul": "Div Add", "Div": "Mul FloorDiv", "FloorDiv": "Div Mul",
    "Mod": "FloorDiv Mul", "Pow": "Mul", "BitOr": "BitAnd", "BitAnd": "BitOr",
    "Lt": "LtE Gt", "LtE": "Lt Eq", "Gt": "GtE Lt", "GtE": "Gt Eq", "Eq": "NotEq LtE",
    "NotEq": "Eq Lt", "Is": "IsNot", "IsNot": "Is", "USub": "UAdd",
}  # fmt: skip
LEFT_OUT = ("VariableReplacer", "VariableInserter", "ReplaceUnaryOperator_UAdd", "Invert_Not",
            "Invert_UAdd", "Invert_USub")  # fmt: skip

# Module -> its tests, below tests/pruning, fast ones first; "-k" chooses among them as pytest does.
FAMILY = (
    "../convert/families/test_config_values ../convert/families/test_families"
    " ../convert/families/test_fields"
    " -k 'values or {stem} and (writing or spelling or test_a_default or null)'"
)
TESTS = {
    "pruning/scores/criteria.py": "scores/test_criteria scores/test_formulas",
    "pruning/scores/channel_criteria.py": "scores/test_criteria scores/test_formulas",
    "pruning/scores/expert_criteria.py": "scores/test_criteria scores/test_formulas",
    "pruning/scores/statistics.py": "scores/test_statistics scores/test_criteria",
    "pruning/scores/own.py": "scores/test_own",
    "pruning/scores/details.py": "scores/test_details scores/test_formulas",
    "pruning/scores/similarity.py": "scores/test_similarity",
    "pruning/scores/noise.py": "scores/test_noise scores/test_formulas",
    "pruning/scores/ablation.py": "scores/test_ablation",
    "pruning/scores/collect.py": "scores/test_noise scores/test_details"
    " -k 'noise or weights_alone or vectors'",
    "pruning/scores/curvature.py": "scores/test_end_to_end -k second_order",
    "pruning/scores/end_to_end.py": "scores/test_end_to_end scores/test_formulas",
    "pruning/scores/expert_sums.py": "../moe_jax/experts/test_swiglu scores/test_formulas"
    " -k 'taken or statistic'",
    "pruning/scores/layer.py": "scores/test_layer"
    " -k 'loop_over or finite or closed_form or abs_and or tile_sums or expert_gradient'",
    "pruning/scores/layer_sums.py": "scores/test_text_sweep -k sweep",
    "moe_jax/spread.py": "../moe_jax/test_spread",
    "pruning/runs/places.py": "runs/test_places -k 'not killed'",
    "pruning/recipe/place_options.py": "runs/test_places -k 'not killed'",
    "pruning/scores/states.py": "scores/test_state_slots",
    "pruning/scores/grouped.py": "scores/test_grouped",
    "pruning/scores/grouped_gradients.py": "scores/test_grouped",
    "moe_jax/groups.py": "scores/test_grouped",
    "convert/layer_reader.py": "scores/test_grouped",
    "moe_jax/experts/pool.py": "../moe_jax/experts/test_pool",
    "pruning/kit/array_files.py": "kit/test_array_files",
    "pruning/shrink/repair_groups.py": "shrink/test_repair_groups",
    "pruning/shrink/repair_rows.py": "shrink/test_repair_groups",
    "pruning/shrink/gptq_groups.py": "shrink/test_gptq_groups",
    "pruning/shrink/gptq_codes.py": "shrink/test_gptq_groups",
    "pruning/shrink/fewer_experts.py": "shrink/test_fewer_experts",
    "pruning/budget/merging.py": "budget/test_merging",
    "pruning/scores/likeness.py": "scores/test_likeness",
    "pruning/shrink/merge.py": "shrink/test_merge",
    "pruning/shrink/merge_model.py": "shrink/test_merge_model",
    "pruning/runs/merged.py": "runs/test_merged",
    "pruning/runs/calibration_sets.py": "runs/test_calibration_sets",
    "pruning/runs/layers_alone.py": "runs/test_layers_alone",
    "pruning/report/comparison_*.py": "report/test_{stem}",
    "pruning/scores/elimination.py": "scores/test_elimination -k 'not plans'",
    "pruning/scores/grams.py": "scores/test_gram_values scores/test_elimination"
    " -k 'gram_values or sums or scoring'",
    "pruning/scores/sample.py": "scores/test_grouped scores/test_elimination -k 'others or sums'",
    "pruning/scores/parts.py": "scores/test_parts",
    "pruning/scores/routed.py": "shrink/test_repair_model -k 'fitted or error_at'",
    "pruning/scores/sweep_log.py": "scores/test_sweep_log",
    "pruning/scores/text_sweep.py": "scores/test_text_sweep scores/test_layer"
    " -k 'sweep or streamed'",
    "pruning/scores/weight_facts.py": "scores/test_details shrink/test_prune"
    " -k 'norm_ratio or statistics_of or weights_alone'",
    "pruning/scores/weight_gradient.py": "scores/test_details -k 'weight_times or prompts'",
    "pruning/budget/planners.py": "budget/test_values budget/test_planners",
    "pruning/budget/objectives.py": "budget/test_values budget/test_planners",
    "pruning/budget/importance.py": "budget/test_values budget/test_importance",
    "pruning/budget/alignment.py": "budget/test_alignment budget/test_values",
    "pruning/budget/widths.py": "budget/test_values budget/test_widths",
    "pruning/budget/apportion.py": "budget/test_apportion budget/test_widths",
    "pruning/budget/optimum.py": "budget/test_optimum budget/test_values",
    "pruning/budget/clusters.py": "budget/test_clusters budget/test_rules",
    "pruning/budget/whole_experts.py": "budget/test_whole_experts budget/test_values",
    "pruning/budget/candidates.py": "budget/test_candidates",
    "pruning/budget/outliers.py": "budget/test_outliers",
    "pruning/budget/decide.py": "budget/test_record budget/test_decide budget/test_widths"
    " budget/test_outliers",
    "pruning/budget/record.py": "budget/test_record budget/test_plan budget/test_values",
    "pruning/budget/rule.py": "budget/test_rules",
    "pruning/budget/rules.py": "budget/test_rules",
    "pruning/budget/problem.py": "budget/test_record budget/test_values budget/test_decide",
    "pruning/budget/several_budgets.py": "budget/test_several_budgets",
    "pruning/budget/plan.py": "budget/test_plan",
    "pruning/shrink/gptq_core.py": "shrink/test_gptq_core",
    "pruning/shrink/gptq_model.py": "shrink/test_layer_folder",
    "pruning/shrink/gptq*.py": "shrink/test_gptq_core shrink/test_gptq"
    " -k 'core or shipped or plain_loop or memory or starved or bit_for or summary or little'",
    "pruning/shrink/moments.py": "shrink/test_moments",
    "pruning/shrink/progress.py": "shrink/test_layer_folder",
    "pruning/kit/progress.py": "kit/test_progress",
    "pruning/shrink/prune.py": "shrink/test_prune",
    "pruning/shrink/repair.py": "shrink/test_repair",
    "pruning/shrink/repair*.py": "shrink/test_repair shrink/test_repair_model",
    "pruning/shrink/masked*.py": "shrink/test_masked",
    "pruning/shrink/taken_over.py": "shrink/test_taken_over",
    "pruning/shrink/rounding.py": "shrink/test_rounding",
    "pruning/measure/agreement.py": "runs/test_audit"
    " -k 'correlation or agreement or spread or report_ranks or rows_of or sample_of'",
    "pruning/measure/loss_curves.py": "measure/test_tokens",
    "pruning/measure/choice.py": "measure/test_choice",
    "pruning/measure/quality.py": "measure/test_quality -k 'states or broken or by_hand'",
    "pruning/measure/settled.py": "measure/test_settled -k 'tie or settled_token or is_gone'",
    "pruning/measure/*.py": "measure/test_{stem}",
    "pruning/runs/compared_tasks.py": "runs/test_compared_tasks",
    "pruning/runs/compare*.py": "runs/test_compare_values",
    "pruning/runs/plan_groups.py": "runs/test_compare_values",
    "pruning/report/comparison.py": "report/test_comparison",
    "pruning/stages/sizes.py": "stages/test_sizes",
    "pruning/stages/size_bounds.py": "stages/test_sizes",
    "pruning/stages/verify.py": "stages/test_verify_values",
    "pruning/stages/choose.py": "stages/test_choose_values",
    "pruning/stages/checks.py": "stages/test_checks measure/test_settled"
    " -k 'test_checks or _positions or the_limit or eight'",
    "pruning/stages/client.py": "stages/test_client",
    "pruning/stages/made_by.py": "stages/test_made_by",
    "pruning/stages/parts.py": "stages/test_parts_values",
    "pruning/stages/probe_windows.py": "stages/test_probe_windows"
    " -k 'reach or few_tokens or quarters or document or text'",
    "pruning/stages/rule_losses.py": "stages/test_rule_losses stages/test_choose_values",
    "pruning/stages/tokenizer_check.py": "stages/test_tokenizer_values",
    "pruning/stages/content.py": "stages/test_content",
    "pruning/stages/gptq.py": "stages/test_layer_stages",
    "pruning/stages/layers.py": "stages/test_layer_stages",
    "pruning/stages/repair.py": "stages/test_layer_stages stages/test_sizes"
    " -k 'layer_stages or repair'",
    "pruning/stages/plan.py": "stages/test_plan_values",
    "pruning/text/calibration.py": "text/test_encoding text/test_edges text/test_calibration",
    "pruning/text/chat.py": "text/test_chat",
    "pruning/text/chat_rows.py": "text/test_chat_rows",
    "pruning/text/conversation.py": "text/test_chat text/test_chat_calibration",
    "pruning/text/conversion.py": "text/test_tokenizer",
    "pruning/text/documents.py": "text/test_layouts text/test_documents -k 'not bomb'",
    "pruning/text/encoding.py": "text/test_encoding",
    "pruning/text/kept_out.py": "stages/test_choose -k 'few_and or only_the_ends or as_many'",
    "pruning/text/held_out.py": "text/test_held_out -k share",
    "pruning/text/source.py": "text/test_sources",
    "pruning/text/tokenizer.py": "text/test_tokenizer text/test_chat",
    "pruning/text/windows.py": "text/test_encoding text/test_edges",
    "pruning/text/json_values.py": "text/test_json_values",
    "pruning/text/*.py": "text/test_layouts text/test_sources text/test_chat_rows",
    "convert/axes.py": "../convert/test_axes",
    "convert/rules.py": "../convert/families/test_config_values ../convert/families/test_wrappers"
    " ../convert/test_layouts ../convert/test_formats -k 'values or spelled or fused or stay_16'",
    "convert/fields.py": "../convert/test_field_ranges",
    "convert/interleaved.py": "../convert/test_interleaved",
    "convert/sound.py": "../convert/test_sound",
    "convert/export_format.py": "../convert/test_export_format ../convert/test_formats",
    "convert/formats/modeling_ragged_moe.py": "../convert/test_ragged_code",
    "convert/formats/wrapped.py": "../convert/test_export_format",
    "convert/formats/float8.py": "../convert/test_format_configs runs/test_float8"
    " -k 'float8 or whole or nearest'",
    "convert/formats/*.py": "../convert/test_format_configs ../convert/test_formats",
    "convert/quantized/awq.py": "../convert/quantized/test_formats -k awq",
    "convert/quantized/gptq.py": "../convert/quantized/test_formats -k gptq",
    "convert/quantized/normal_float.py": "../convert/quantized/test_normal_float",
    "convert/quantized/found.py": "../convert/quantized/test_normal_float"
    " ../convert/quantized/test_formats -k 'normal_float or awq or axis or do_not_fit'",
    "convert/quantized/compressed.py": "../convert/quantized/test_formats"
    " -k 'int or fp8 or scheme'",
    "convert/quantized/float8.py": "../convert/quantized/test_formats"
    " ../convert/families/test_deepseek_v3 -k 'fp8 or blocks'",
    "convert/quantized/config.py": "../convert/quantized/test_config",
    "convert/quantized/*.py": "../convert/quantized/test_formats -k 'awq or gptq-8 or int4-zeros'",
    "convert/families/__init__.py": "../convert/test_errors",
    "convert/families/hf_config.py": FAMILY.format(stem="(qwen2_moe or deepseek_v3)"),
    "convert/families/tables.py": "../convert/test_side_files ../convert/families/test_fields",
    "convert/families/*.py": FAMILY,
}


def tests_of(module: str) -> list[str]:
    """Arguments for pytest that name the tests of a module; none where it has none."""
    words = shlex.split(next((t for m, t in TESTS.items() if fnmatch.fnmatch(module, m)), ""))
    words = [word.replace("{stem}", Path(module).stem) for word in words]
    names, choice = (words[:-2], words[-2:]) if "-k" in words else (words, [])
    found = [(ROOT / "tests" / "pruning" / name).resolve() for name in names]
    files = [path if path.is_dir() else path.with_suffix(".py") for path in found]
    return [*(str(path.relative_to(ROOT)) for path in files if path.exists()), *choice]


# --- mutants ---


def operators() -> list[str]:
    """Names of cosmic-ray's operators without those that do little but raise TypeError."""

    def wanted(name: str) -> bool:
        _, *pair = name.removeprefix("core/").split("_")
        if any(part in name for part in LEFT_OUT):
            return False
        return len(pair) < 2 or pair[0] == "Delete" or pair[1] in KIN.get(pair[0], "").split()

    return [name for name in operator_names() if wanted(name)]


Place = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of its start and its end


def spared(source: str) -> list[Place]:
    """Types, asserts for the type checker and what only it reads: no test could see them change."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, "returns", None), getattr(node, "annotation", None)]
        if isinstance(node, ast.Assert) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            parts.append(node)
        found += [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts if p]
    return found


def places(source: str) -> list[tuple[Place, list[tuple[str, int]]]]:
    """Every place that can be mutated, with (operator, its occurrence) of each mutant there."""
    tree, skip = get_ast(source), spared(source)
    found: dict[Place, list[tuple[str, int]]] = {}
    for name in operators():
        operator, occurrence = get_operator(name)(), 0
        for node in ast_nodes(tree):
            for start, stop in operator.mutation_positions(node):
                if not any(first <= start < last for first, last in skip):
                    found.setdefault((start, stop), []).append((name, occurrence))
                occurrence += 1
    return sorted(found.items())


def digest(text: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sample(module: str, count: int | None, seed: int) -> list[dict]:
    """Mutants of a module: one at each of `count` places drawn at random, or all there are."""
    source, rng = (ROOT / module).read_text(), random.Random(f"{seed} {module}")
    chosen, version = places(source), digest(source)
    if count is not None:
        chosen = rng.sample(chosen, min(count, len(chosen)))
        chosen = [(place, [rng.choice(ways)]) for place, ways in chosen]
    mutants = []
    for (start, _), ways in chosen:
        for name, occurrence in ways:
            try:
                text = mutate_code(source, get_operator(name)(), occurrence)
            except AttributeError:  # cosmic-ray knows no exceptions with a dot in their name
                continue
            if text is None or text == source:
                continue
            diff = [line for line in difflib.unified_diff(
                source.splitlines(), text.splitlines(), lineterm="", n=0)][3:]  # fmt: skip
            mutants.append(
                {"key": digest(module + text), "module": module, "source": version,
                 "line": start[0], "operator": name[5:], "diff": diff, "text": text}
            )  # fmt: skip
    return mutants


def reason(mutant: dict, known: list[list[str]]) -> str | None:
    """Why a mutant is equivalent, if it is listed: modules | line before | line after | reason."""
    before, after = (
        [line[1:].strip() for line in mutant["diff"] if line[0] == sign] for sign in "-+"
    )
    for module, old, new, why in known:
        if not fnmatch.fnmatch(mutant["module"], module) or old not in before:
            continue
        if new in after or new == "*":
            return why
    return None


# --- running ---


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves one module of the library from a text."""

    def __init__(self, module: str, text: str):
        self.name = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.path, self.text = str(ROOT / module), text

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.text, self.path, "exec"), module.__dict__)


def warm_up() -> None:
    """Import what every run needs, the library aside; jax starts no thread until it computes."""
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they would want to come before the rest
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    for name in WARM:
        importlib.import_module(name)
    from hypothesis import Phase, settings

    # The first example that fails is enough, and the same ones are tried for every mutant.
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate],
                              derandomize=True, deadline=None)  # fmt: skip
    settings.load_profile("mutants")


def run(module: str, text: str, files: list[str], limit: float) -> tuple[str, float, str]:
    """Run tests on a mutated module within seconds of computing, not of waiting for other programs.

    Returns:
      (killed, survived or timeout; seconds of computing; end of the output).
    """
    began, log = time.monotonic(), tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
        sys.meta_path.insert(0, Mutated(module, text))
        import pytest

        code = 1
        try:
            options = ["-o", "addopts=", "-p", "no:cacheprovider", "-xq"]
            code = int(pytest.main([*options, "--tb=line", *files]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while not (found := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() - began > WAIT * limit:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    _, status, used = found
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests left running
    log.seek(0)
    end = log.read().decode(errors="replace")[-1500:]
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    late = by in (signal.SIGXCPU, signal.SIGKILL)
    outcome = "timeout" if late else "survived" if status == 0 else "killed"
    return outcome, used.ru_utime + used.ru_stime, end


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("modules", nargs="*", help="paths or patterns of modules of the library")
    parser.add_argument("--sample", type=int, metavar="N", help="places per module; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--retry", action="store_true", help="run only survivors of before, again")
    parser.add_argument("--table", action="store_true", help="only show what is known")
    arguments = parser.parse_args()
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    done = {one["key"]: one for one in map(json.loads, lines)}
    wanted = arguments.modules or list(TESTS)
    paths = [str(p.relative_to(ROOT)) for room in ("pruning", "convert", "moe_jax")
             for p in sorted((ROOT / room).rglob("*.py"))]  # fmt: skip
    modules = [p for p in paths if any(fnmatch.fnmatch(p, w) for w in wanted) and tests_of(p)]
    if arguments.table:
        now = {module: digest((ROOT / module).read_text()) for module in modules}
        mutants = [one for one in done.values() if now.get(one["module"]) == one["source"]]
    else:
        alive = {key for key, one in done.items() if one["outcome"] == "survived"}
        count = None if arguments.retry else arguments.sample
        mutants = [one for module in modules for one in sample(module, count, arguments.seed)
                   if not arguments.retry or one["key"] in alive]  # fmt: skip
        _run_all(mutants, done, arguments)
    show(mutants, done)


def _run_all(mutants: list[dict], done: dict[str, dict], arguments) -> None:
    warm_up()
    limits: dict[str, float] = {}
    for number, mutant in enumerate(mutants):
        module, key = mutant["module"], mutant["key"]
        if key in done and not (arguments.retry and done[key]["outcome"] == "survived"):
            continue
        files = tests_of(module)
        if module not in limits:
            outcome, seconds, end = run(module, (ROOT / module).read_text(), files, 900)
            if outcome != "survived":
                sys.exit(f"{module}: its tests fail unchanged ({files})\n{end}")
            limits[module] = 2 * seconds + 5
            print(f"{module}: {seconds:.0f} s unchanged", flush=True)
        outcome, seconds, _ = run(module, mutant["text"], files, limits[module])
        first = done.get(key, {}).get("first", outcome)
        known = {name: value for name, value in mutant.items() if name != "text"}
        done[key] = {**known, "first": first, "outcome": outcome}
        with arguments.results.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
        print(f"{number + 1}/{len(mutants)} {outcome} {seconds:.0f} s {module}:{mutant['line']} "
              f"{mutant['operator']}", flush=True)  # fmt: skip


def show(mutants: list[dict], done: dict[str, dict]) -> None:
    """Print survivors as differences, then one row per module."""
    rows = [line for line in EQUIVALENT.read_text().splitlines() if line and line[0] != "#"]
    known = [[part.strip().replace(r"\|", "|") for part in line.split(" | ")] for line in rows]
    table: dict[str, dict[str, int]] = {}
    for mutant in mutants:
        if mutant["key"] not in done:
            continue
        outcome, first = (done[mutant["key"]][name] for name in ("outcome", "first"))
        if outcome == "survived" and reason(mutant, known):
            outcome = "equivalent"
        counts = table.setdefault(mutant["module"], {})
        counts[outcome] = counts.get(outcome, 0) + 1
        if first == "survived" and outcome != "equivalent":
            counts["lived"] = counts.get("lived", 0) + 1
        if outcome == "survived":
            print(f"\n{mutant['module']}:{mutant['line']} {mutant['operator']}")
            print("\n".join(mutant["diff"]))
    kinds = ("killed", "timeout", "survived", "equivalent", "lived")
    print("\n| module | killed | timeout | survived | equivalent | of the others dead | at first |")
    print("|---|" + "---|" * 6)
    total = {kind: sum(counts.get(kind, 0) for counts in table.values()) for kind in kinds}
    for module, counts in [*sorted(table.items()), ("all", total)]:
        killed, late, alive, equal, lived = (counts.get(kind, 0) for kind in kinds)
        others = killed + late + alive
        shares = (f"{part / others:.0%}" if others else "-"
                  for part in (killed + late, others - lived))  # fmt: skip
        print("| " + " | ".join(map(str, (module, killed, late, alive, equal, *shares))) + " |")


if __name__ == "__main__":
    main()
