"""An estimate for people: what a compression gives, who loads it, what it costs."""

from typing import Any

from pruning.kit.words import duration, megabytes
from pruning.report.phrases import NOMINALLY, nominally
from pruning.report.table import TextTable

STAGES = {  # of `pruning.runs.memory.memory`
    "scoring": "to score",
    "planning": "to plan",
    "choice": "to measure rules",
    "repair": "to repair",
    "gptq": "for GPTQ",
    "export": "to export",
    "verify": "to verify",
    "transformers": "to verify in transformers, beside it",
    "evaluation": "to evaluate",
    "sample": "to continue texts",
}
PLACES = ("total", "routed", "shared", "attention", "embeddings", "other", "mtp", "active")


def estimate_tables(found: dict[str, Any]) -> list[TextTable]:
    """The tables of one entry of `pruning.runs.estimate.estimate`."""
    return [_parameters(found), _sizes(found), _clients(found), _rules(found), _recovery(found),
            _costs(found)]  # fmt: skip


def _parameters(found: dict[str, Any]) -> TextTable:
    rate = found["prune_rate"]
    budget = f"prune rate {rate}"
    if rate is None:
        budget = f"the target, prune rate {found['removed']:.3f}"
    models = {"dense": found["parameters"]}
    models |= {name: one["parameters"] for name, one in found["exports"].items()}
    rows = [[name, *(f"{p[key] / 1e6:,.1f}" for key in PLACES)] for name, p in models.items()]
    note = (
        "Routed: of experts that a router chooses among. Active: what one token meets, if experts "
        "have average width. mtp: of layers that predict further tokens. Padding is not counted."
    )
    return TextTable(f"Parameters in millions at {budget}", ["model", *PLACES], rows, note)


def _sizes(found: dict[str, Any]) -> TextTable:
    rows = []
    for name, one in found["exports"].items():
        sizes = [megabytes(one[key]) for key in ("bytes", "fewest_bytes", "most_bytes")]
        group, width = one["group_size"], one["width"]
        own = "its layer's" if name.startswith("layered") else "its own"
        stored = own if width is None else f"{width:,}"
        written = f"{found['dense_bytes'] / one['bytes']:.2f}"
        counted = nominally(name, found["parameters"]["total"], one["parameters"]["total"])
        rows.append([name, *sizes, written, counted, stored, "" if group is None else str(group)])
    header = ["format", "MB", "fewest", "most", "times smaller", "nominally", "width of an expert",
              "weights per scale"]  # fmt: skip
    note = (
        "Weight files and index, headers included. Fewest and most: over all plans, since only "
        "scoring says how many experts are emptied, which have no tensors in a ragged folder, and "
        "how wide the widest is, to which a padded folder pads the others, a layered one those of "
        f"its layer. The dense model has {megabytes(found['dense_bytes'])} MB. {NOMINALLY}"
    )
    return TextTable("On disk", header, rows, note)


def _verdicts(found: dict[str, Any]) -> list[tuple[str, str, dict[str, str]]]:
    return [
        (name, client, said)
        for name, one in found["exports"].items()
        for client, said in one["clients"].items()
    ]


def _numbers(found: dict[str, Any]) -> dict[str, int]:
    """Rule -> its number in the tables."""
    rules = dict.fromkeys(said["rule"] for _, _, said in _verdicts(found))
    return {rule: number for number, rule in enumerate(rules, 1)}


def _clients(found: dict[str, Any]) -> TextTable:
    numbers, cells = _numbers(found), {}
    for name, client, said in _verdicts(found):
        cells[client, name] = f"{said['verdict']} ({numbers[said['rule']]})"
    names = list(found["exports"])
    clients = dict.fromkeys(client for client, _ in cells)
    rows = [[client, *(cells[client, name] for name in names)] for client in clients]
    parallel = found["tensor_parallel"]
    title = "Who loads it, and the rule that decides"
    if parallel > 1:
        title += f", on {parallel} GPUs that share each layer"
    return TextTable(title, ["program", *names], rows)


def _rules(found: dict[str, Any]) -> TextTable:
    rows = [[f"({number})", rule] for rule, number in _numbers(found).items()]
    note = (
        "Without --cut-router no export takes experts out of the router, an emptied one adds zero: "
        "expert counts, "
        "groups of experts (n_group) and router biases stay as the programs know them. 4-bit "
        "integers are symmetric, since transformers loads no asymmetric experts."
    )
    return TextTable("Rules", ["", "rule"], rows, note)


def _costs(found: dict[str, Any]) -> TextTable:
    disk, seconds = found["disk"], found["scoring_seconds"]
    written = " + ".join(f"{name} {megabytes(size)}" for name, size in disk["parts"].items())
    scored = f"{found['tokens']:,} tokens" if found["tokens"] else "the weights"
    time = "not probed" if seconds is None else f"about {duration(seconds)}"
    choosing, kept = found["choosing_seconds"], found["kept_out_tokens"]
    choice = "not probed" if choosing is None else f"about {duration(choosing)}"
    measured = [[f"time to measure rules on {kept:,} of them", choice]] if kept else []
    rows = [
        *(
            [f"memory {STAGES[stage]}", f"about {megabytes(size)} MB"]
            for stage, size in found["memory"].items()
            if size
        ),
        [f"time to score {scored}", time],
        *measured,
        ["disk needed", f"at most {megabytes(disk['needed_bytes'])} MB: {written} + spare"],
        ["disk free", f"{megabytes(disk['free_bytes'])} MB"],
    ]
    if apart := disk.get("scratch"):
        needed, free = (megabytes(apart[name]) for name in ("needed_bytes", "free_bytes"))
        rows.append(["scratch disk", f"at most {needed} MB, {free} MB free"])
    note = (
        "Transformers is asked in a process of its own, and only where it is installed and so "
        "much memory is free. Reading weights, compiling and measuring quality come on top of the "
        "time."
    )
    return TextTable("Costs", ["what", "how much"], rows, note)


def _recovery(found: dict[str, Any]) -> TextTable:
    costs, seconds = found["recovery"], found["recovery_seconds"]
    rows = [
        [
            kind, f"{one['parameters'] / 1e6:,.1f}",
            *(megabytes(one["memory_bytes"][mode]) for mode in ("model", "layer")),
            megabytes(one["checkpoint_bytes"]),
        ]
        for kind, one in costs["trained"].items()
    ]  # fmt: skip
    time = "not probed" if seconds is None else f"at most about {duration(seconds)} of training"
    note = (
        f"On {costs['tokens']:,} tokens of text, with the other defaults of `recover`: {time}; the "
        f"dense model's predictions take {megabytes(costs['predictions_bytes'])} MB of disk until "
        "the end (none with --mode layer), checkpoints and what was trained come on top. Reading "
        "weights, compiling, the head and measuring quality come on top of the time."
    )
    header = ["recover --train", "millions trained", "MB of memory", "MB with --mode layer",
              "MB of checkpoints"]  # fmt: skip
    return TextTable("Training afterwards", header, rows, note)
