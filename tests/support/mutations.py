"""Folders damaged at random: each must open, or be refused in one clear message.

`python -m tests.support.mutations FOLDER FIRST COUNT` damages a copy of FOLDER once per seed, a
checkpoint or the output folder of `score` and `plan`, opens it in this process under a limit of
memory and of processor time, and prints what ended otherwise, a line of JSON each.
"""

import gc
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import yaml

MEMORY, SECONDS = 1 << 30, 2  # beyond what the imports take; for one case
SHORTEST, LONGEST = 8, 20_000  # characters of a message

DEEP = "[" * 100_000 + "]" * 100_000
VALUES = (
    None, True, False, "no", "", "x" * 50_000, [], {}, [1], ["a"], [[1]], {"a": 1}, [None], 0, -1,
    1, 2, 3, 1.5, 4096.5, -0.5, 1e308, float("nan"), float("inf"), 10**6, 10**9, 10**18, 10**30,
    ["full_attention"] * 3, list(range(1000)), {"rope_type": "yarn", "factor": "4"},
    [1, [2, {"b": 3}]],
)  # fmt: skip
MORE_KEYS = (
    "num_nextn_predict_layers", "quantization_config", "rope_scaling", "rope_parameters",
    "layer_types", "norm_topk_prob", "moe_intermediate_size", "head_dim", "sliding_window",
    "mlp_only_layers", "num_experts", "num_local_experts", "n_routed_experts",
    "first_k_dense_replace", "model_type",
    "expert_intermediate_sizes", "unpruned_intermediate_size", "emptied_experts", "eos_token_id",
)  # fmt: skip
QUANTIZATIONS = (
    {"quant_method": "fp8", "weight_block_size": [0, "a"]},
    {"quant_method": ["fp8"]},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": [1]},
    {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": "32"}}}},
    {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"g": None}},
)  # fmt: skip
ENTRIES = (
    {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": "32", "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [0, 10**12], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [10**12, 0, 4], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1] * 5000, "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [0]},
    {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**15]},
    {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
    {}, [], None, 1, "text",
)  # fmt: skip


def damage(folder: Path, seed: int) -> str:
    """Damage one thing in a folder; says what."""
    rng = random.Random(seed)
    if (folder / "plan.json").is_file():
        return _damage_output(folder, rng)
    files = {
        "config.json": _config, "*.safetensors": _header, "*.index.json": _index,
        "tokenizer.json": _text, "tokenizer_config.json": _config,
    }  # fmt: skip
    pattern = rng.choices(list(files), [8, 6, 2, 1, 1])[0]
    found = sorted(folder.glob(pattern)) or [folder / "config.json"]
    path = rng.choice(found)
    change = files[pattern] if path.match(pattern) else _config
    if rng.random() < 0.1 and path.suffix == ".json":
        change = _text
    return f"{path.name}: {change(path, rng)}"


def _damage_output(folder: Path, rng: random.Random) -> str:
    changes = {
        "plan.json": _nested, "statistics.json": _nested, "recipe.yaml": _recipe,
        "plan.safetensors": _header, "statistics.safetensors": _header, "compare.json": _nested,
        "report.json": _nested, "gptq/gptq.json": _nested, "model.json": _nested,
        "ablations.jsonl": _line, "exports/ragged-int4/provenance.yaml": _recipe,
        "choice.json": _nested, "repair/repair.json": _nested,
        "repair/layer-00000.safetensors": _header, "gptq/layer-00000.safetensors": _header,
        "exports/ragged-int4/config.json": _config,
        "exports/ragged-int4/model.safetensors": _header,
    }  # fmt: skip
    # A report has a hundred fields.
    name = rng.choices(list(changes), [5 if name == "report.json" else 1 for name in changes])[0]
    change = changes[name]
    if rng.random() < 0.1 and name.endswith(".json"):
        change = _text
    return f"{name}: {change(folder / name, rng)}"


def _nested(path: Path, rng: random.Random) -> str:
    """Another value at any depth."""
    content = json.loads(path.read_text())
    told = _change(content, rng)
    path.write_text(json.dumps(content))
    return told


def _line(path: Path, rng: random.Random) -> str:
    """The same in one of several lines of JSON."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = _change(lines, rng)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return told


def _change(where: dict | list, rng: random.Random) -> str:
    told = ""
    while True:
        key = rng.choice(list(where) if isinstance(where, dict) else range(len(where)))
        told += f".{key}"
        if not (isinstance(where[key], dict | list) and where[key]) or rng.random() < 0.4:
            break
        where = where[key]
    if rng.random() < 0.2:
        del where[key]
    else:
        where[key] = rng.choice(VALUES)
        told += f" {str(where[key])[:40]}"
    return told


def _recipe(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.2:
        return _bytes(path, path.read_bytes(), rng)
    values = yaml.safe_load(path.read_text())
    key = rng.choice(list(values))
    values[key] = rng.choice(VALUES)
    text = yaml.safe_dump(values)
    if rng.random() < 0.1:
        text = rng.choice(
            (
                f"a: {DEEP}",
                f"{text}deep: {DEEP}",
                "9" * 10_000,
                f"[{text}",
                "seed: " + "9" * 10_000,
                "seed: 2001-99-99",
                "? [1]\n: 2",
                "1: 2",
                "a: &a [*a]",
                "? {a: 1}\n: 2",
            )
        )
    path.write_text(text)
    return f"{key} {str(values[key])[:40]}"


def _config(path: Path, rng: random.Random) -> str:
    config = json.loads(path.read_text())
    where, key = config, rng.choice(sorted({*config, *MORE_KEYS}))
    if isinstance(config.get(key), dict) and config[key] and rng.random() < 0.7:
        where, key = config[key], rng.choice(sorted(config[key]))
    if rng.random() < 0.1 and key in where:
        del where[key]
        told = "gone"
    else:
        where[key] = rng.choice(QUANTIZATIONS if key == "quantization_config" else VALUES)
        told = repr(where[key])[:60]
    path.write_text(json.dumps(config))
    return f"{key} {told}"


def _header(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        return _bytes(path, content, rng)
    entries, told = json.loads(content[8 : 8 + length]), ""
    name = rng.choice(sorted(set(entries) - {"__metadata__"}))
    if rng.random() < 0.15:
        entries["__metadata__"] = rng.choice(VALUES)
        told = "metadata"
    elif rng.random() < 0.5:
        entries[rng.choice((name, "other", "model.layers.0.mlp.experts.down_proj"))] = rng.choice(
            ENTRIES
        )
        told = "entry"
    else:
        field = rng.choice(("dtype", "shape", "data_offsets"))
        entries[name][field] = rng.choice((*VALUES, "BF16", "F32", "I32", "U8", [2, 2], [0, 8]))
        told = f"{name} {field} {str(entries[name][field])[:40]}"
    text = DEEP if rng.random() < 0.03 else json.dumps(entries)
    head = text.encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])
    return told


def _bytes(path: Path, content: bytes, rng: random.Random) -> str:
    kind = rng.choice(("cut", "flip", "length"))
    if kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "flip":
        at = rng.randrange(min(2000, len(content)))
        content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    else:
        content = rng.getrandbits(64).to_bytes(8, "little") + content[8:]
    path.write_bytes(content)
    return kind


def _index(path: Path, rng: random.Random) -> str:
    index = json.loads(path.read_text())
    name = rng.choice(sorted(index["weight_map"]))
    kind = rng.choice(("file", "gone", "more", "map"))
    if kind == "file":
        index["weight_map"][name] = rng.choice((*VALUES, "../x.safetensors", "absent.safetensors"))
    elif kind == "gone":
        del index["weight_map"][name]
    elif kind == "more":
        index["weight_map"]["other"] = index["weight_map"][name]
    else:
        index["weight_map"] = rng.choice(VALUES)
    path.write_text(json.dumps(index))
    return kind


def _text(path: Path, rng: random.Random) -> str:
    text = path.read_text()
    kind = rng.choice(("deep", "cut", "bytes", "number", "list"))
    written = {
        "deep": text.rstrip()[:-1] + ', "deep": ' + DEEP + "}",
        "cut": text[: rng.randrange(len(text))],
        "bytes": "\udcff" + text,
        "number": text.rstrip()[:-1] + ', "big": ' + "9" * 10_000 + "}",
        "list": f"[{text}]",
    }[kind]
    path.write_bytes(written.encode(errors="surrogateescape"))
    return kind


def readers(folder: Path) -> list[Callable[[], object]]:
    """All that reads what commands wrote: each on its own, as a command would."""
    from convert.export_format import ExportFormat
    from pruning.budget.candidates import CANDIDATES
    from pruning.budget.plan import PruningPlan
    from pruning.budget.record import recorded_options
    from pruning.cli.tables import plans_table
    from pruning.kit.progress import Steps
    from pruning.measure.ablation_record import read_record
    from pruning.report import comparison_page, compression_page
    from pruning.report.comparison import Comparison
    from pruning.report.compression import CompressionReport
    from pruning.shrink.gptq_model import codes_in
    from pruning.shrink.repair_model import repaired_in
    from pruning.stages import plan as planning
    from pruning.stages.card import card_files, rounded_again
    from pruning.stages.choose import choose, measurable
    from pruning.stages.job import resolved
    from pruning.stages.made_by import stale_exports
    from pruning.stages.repair import repair_facts, stored_repair
    from pruning.stages.score import stored_statistics
    from pruning.stages.stored import stored_base, stored_recipe

    nothing: Any = SimpleNamespace(kept_out=None)
    steps, export = Steps(quiet=True), folder / "exports" / "ragged-int4"

    def base():
        return stored_base(stored_recipe(folder), steps)

    def planned_again() -> None:
        recipe = resolved(stored_recipe(folder).fixed(), base().about)
        planning.plan(recipe, *stored_statistics(folder, base()), base().about)

    def chosen_again() -> None:
        recipe = resolved(stored_recipe(folder), base().about)
        statistics, provenance = stored_statistics(folder, base())
        recipe = measurable(recipe, provenance, steps)
        with patch.dict(CANDIDATES, dict([next(iter(CANDIDATES.items()))]), clear=True):
            choose([recipe], statistics, provenance, base(), lambda: nothing, steps)

    def plan() -> None:
        found = PruningPlan.load(folder)
        recorded_options(found.provenance)
        stale_exports(folder, found)
        plans_table([(folder, found)])

    def card() -> None:
        found, form = PruningPlan.load(folder), ExportFormat("ragged-int4")
        repair = stored_repair(stored_recipe(folder), found)
        text = card_files(base(), found, form, quantizer="gptq", repair=repair)["README.md"]
        assert callable(text)
        text()

    def codes() -> None:
        found = codes_in(folder / "gptq")
        found.fault(plan=PruningPlan.load(folder).content_hash)
        found.arrays(0)

    def repaired() -> None:
        repair_facts(stored_repair(stored_recipe(folder), PruningPlan.load(folder)))
        repaired_in(folder / "repair").arrays(0)

    def compared() -> None:
        found = Comparison.load(folder / "compare.json")
        found.table()
        with patch.object(comparison_page, "figure_html"):  # made and not drawn
            comparison_page.comparison_page(found)

    def report() -> None:
        found = CompressionReport.load(folder / "report.json")
        found.terminal_table()
        with patch.object(compression_page, "figure_html"):
            compression_page.page(found)

    def ablations() -> None:
        read_record(folder / "ablations.jsonl", {})

    def exported() -> None:
        opened(export)
        rounded_again(export)

    return [plan, planned_again, chosen_again, card, codes, repaired, compared, report, ablations,
            exported]  # fmt: skip


def opened(folder: Path) -> None:
    """Read a checkpoint."""
    from convert import open_checkpoint
    from pruning.text.tokenizer import open_codec

    open_codec(folder, open_checkpoint(folder).config.vocab_size)


# Readers of a single file, which others need not ask.
ALONE = {"compared": "compare.json", "report": "report.json", "ablations": "ablations.jsonl"}


def outcome(folder: Path, seconds: float = SECONDS, damaged: str | None = None) -> str:
    """What happened in a folder that neither opened nor was refused as it should be, else "".

    Args:
      folder: a checkpoint or an output folder.
      seconds: that each reader may take.
      damaged: the file that is damaged, None for any.
    """
    is_model = (folder / "config.json").is_file()
    found = [lambda: opened(folder)] if is_model else readers(folder)
    if damaged is not None:
        found = [one for one in found if ALONE.get(one.__name__, damaged) == damaged]
    return next(filter(None, (_outcome_of(one, seconds) for one in found)), "")


def _outcome_of(reader: Callable[[], object], seconds: float) -> str:
    from moe_jax.errors import InputError

    def late(*_):
        raise TimeoutError(f"more than {seconds} seconds")

    signal.signal(signal.SIGPROF, late)  # processor time: other processes do not count
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        reader()
    except InputError as error:
        told = str(error)
        fits = SHORTEST <= len(told) <= LONGEST
        return "" if fits else f"{reader.__name__}, a message of {len(told)}: {told[:200]}"
    except BaseException as error:
        return f"{reader.__name__}, {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return ""


def main(folder: str, first: str, count: str) -> None:
    """Damage and open; see the module."""
    if first_found := outcome(Path(folder), 100):  # imports, and threads of their own, all of them
        print(json.dumps({"seed": None, "damage": "none", "found": first_found}), flush=True)
    warnings.simplefilter("error", RuntimeWarning)  # what is no number was not read right
    gc.freeze()  # readers collect garbage, of which imports are none
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in range(int(first), int(first) + int(count)):
        with tempfile.TemporaryDirectory() as place:
            copy = Path(shutil.copytree(folder, Path(place) / "model"))
            told = damage(copy, seed)
            if found := outcome(copy, damaged=told.partition(":")[0]):
                print(json.dumps({"seed": seed, "damage": told, "found": found}), flush=True)
    print(json.dumps({"done": int(count)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
