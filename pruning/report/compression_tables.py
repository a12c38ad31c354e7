"""Tables of the parts of report.json: what the terminal prints and the page shows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pruning.kit.words import amount, megabytes, millions, percent
from pruning.report.phrases import NOMINALLY, check_result, nominally, second_rounding
from pruning.report.severity import SCALE, severity
from pruning.report.table import TextTable
from pruning.text.held_out import not_held_out

Part = Mapping[str, Any]  # a field of the report
NAMED = 12  # experts or channels named in a table; report.json has them all
POLICIES = {
    "free": "every expert has a width of its own",
    "capped": "every expert has a width of its own, up to --cap",
    "layer": "the experts of a layer have one width",
    "uniform": "all experts of the model have one width",
    "experts": "experts go whole or stay whole",
    "combined": "some experts go whole, others lose channels",
}


def sizes_table(sizes: Part, model: Part) -> TextTable:
    """Bytes of the source and of every export."""
    source = sizes["source_bytes"]
    bits = source * 8 / model["parameters"]
    rows = [["source", f"{sizes['channels']:,}", megabytes(source), "", "1.00", "", f"{bits:.2f}"]]
    for name, size in sizes["exports"].items():
        padded = size["padded_bytes"]
        rows.append(
            [name, f"{sizes['channels_kept']:,}", megabytes(size["bytes"]),
             megabytes(padded) if padded else "", f"{source / size['bytes']:.2f}",
             nominally(name, model["parameters"], size["parameters"]),
             f"{size['bits_per_parameter']:.2f}"]
        )  # fmt: skip
    header = ["folder", "channels kept", "MB written", "MB if padded", "times smaller",
              "nominally", "bits per parameter"]  # fmt: skip
    note = (
        "MB if padded: the same plan stored at the width of its widest expert, for programs that "
        "know one width only. Bits count all bytes written over the parameters that are left. "
        f"{NOMINALLY}"
    )
    again = [
        f" {name}: {second_rounding(size['rounded_again'])}."
        for name, size in sizes["exports"].items()
        if "rounded_again" in size
    ]
    return TextTable("Sizes", header, rows, note + "".join(again))


def causes_table(sizes: Part, alone: Part) -> TextTable:
    """How much smaller every export is, and what pruning and rounding do alone.

    Args:
      sizes: of the report.
      alone: export -> pruned_bytes (at 16 bits) and rounded_bytes (nothing pruned, None for a
        16-bit export); empty in a report of an earlier version.
    """
    source = sizes["source_bytes"]
    found: list[tuple[str, str, int]] = [("as it was", "", source)]
    for name, size in sizes["exports"].items():
        known = alone.get(name)
        rounded = None if known is None else known["rounded_bytes"]
        if known is not None and rounded is not None:
            found += [("pruning alone", f"{name.partition('-')[0]}-bf16", known["pruned_bytes"]),
                      ("rounding alone", f"{name}, nothing pruned", rounded),
                      ("pruning and rounding", name, size["bytes"])]  # fmt: skip
        elif known is None and not name.endswith("bf16"):
            found.append(("pruning and rounding", name, size["bytes"]))
        else:
            found.append(("pruning", name, size["bytes"]))
    rows = [[what, form, megabytes(size), f"{source / size:.2f}"] for what, form, size in found]
    known = "computed from shapes, not written" if alone else "unknown to this report"
    note = f"What one of the two does alone is {known}; pruning alone stores 16 bits."
    return TextTable("What makes it smaller", ["by", "format", "MB", "times smaller"], rows, note)


def quality_table(quality: Part, evaluation: Part) -> TextTable:
    """Likelihood of every text under every model, and agreement with the dense one."""
    rows = []
    for text, variants in quality.items():
        for number, (variant, q) in enumerate(variants.items()):
            kl = "" if q["kl"] is None else f"{q['kl']:.4f}"
            rows.append(
                [text if number == 0 else "", variant, f"{q['nll']:.4f}", f"{q['perplexity']:.2f}",
                 kl, percent(q["top1"]), f"{q['tokens']:,}"]
            )  # fmt: skip
    header = ["text", "model", "nats/token", "perplexity", "KL", "top-1", "tokens"]
    note = (
        f"Windows of {evaluation['window']:,} tokens. KL: divergence of the dense model's "
        "predictions from this model's, nats per token. top-1: positions with the same most likely "
        "token as the dense model."
    )
    return TextTable("Quality", header, rows, f"{seen_warning(evaluation)} {note}".lstrip())


def seen_warning(evaluation: Part) -> str:
    """Which texts are not held out, "" if all are."""
    return not_held_out(evaluation.get("seen", {}))


def losses_table(quality: Part, random: Part) -> TextTable:
    """What every model loses on every text, as a share of what random channels lose, in a word.

    Args:
      quality: text -> model -> nll, perplexity and so on; "dense" and "pruned" among the models.
      random: the same of random channels: text -> nll and so on; empty if that was not measured.
    """
    rows = []
    for text, models in quality.items():
        dense, pruned = models["dense"], models.get("pruned")
        chance = random.get(text)
        of_random = None
        if chance and pruned and chance["nll"] > dense["nll"]:
            of_random = (pruned["nll"] - dense["nll"]) / (chance["nll"] - dense["nll"])
        shown = models | ({"random channels": chance} if chance else {})
        for number, (name, q) in enumerate(shown.items()):
            added = q["nll"] - dense["nll"]
            word = "" if name in ("dense", "random channels") else severity(added, of_random)
            share = f"{of_random:.2f}" if name == "pruned" and of_random is not None else ""
            rows.append(
                [text if number == 0 else "", name, word,
                 "" if name == "dense" else f"{added:+.4f}", share, f"{q['perplexity']:.2f}"]
            )  # fmt: skip
    note = (
        "pruned: the kept channels in 16 bits; exports as read from disk. ÷ random: what pruning "
        "adds over what random channels add at the same size, both before rounding. "
        f"Scale: {SCALE.words()}"
    )
    if quality and not random:
        note += " Random channels were not measured."
    header = ["text", "model", "loss", "+nats", "÷ random", "perplexity"]
    return TextTable("Losses", header, rows, note)


def verification_table(verification: Sequence[Part]) -> TextTable:
    """Every check of every export."""
    rows, last = [], None
    for check in verification:
        name = check["export"] if check["export"] != last else ""
        last = check["export"]
        rows.append([name, check["check"], check_result(check), check["detail"]])
    return TextTable("Verification", ["export", "check", "result", "detail"], rows)


def stages_table(stages: Sequence[Part]) -> TextTable:
    """Time and memory of every stage."""
    rows = [
        [stage["name"], f"{stage['seconds']:.1f}", f"{stage['peak_memory_bytes'] / 1e6:,.0f}"]
        for stage in stages
    ]
    total = sum(stage["seconds"] for stage in stages)
    peak = max((stage["peak_memory_bytes"] for stage in stages), default=0)
    rows.append(["all", f"{total:.1f}", f"{peak / 1e6:,.0f}"])
    note = "Peak: the largest resident memory of the process up to the end of the stage."
    return TextTable("Stages", ["stage", "seconds", "peak MB"], rows, note)


def layer_table(
    counts: Sequence[Sequence[int]],
    coverage: Sequence[float],
    layer_indices: Sequence[int],
    d_expert: int,
    criterion: str,
    concentration: Part,
) -> TextTable:
    """What every layer keeps; as long as the model is deep, so for the page only.

    Args:
      counts, coverage, layer_indices, d_expert: of the report.
      criterion: the name of the channel score.
      concentration: of the report.
    """
    rows = []
    for layer, row, covered in zip(layer_indices, counts, coverage, strict=True):
        kept = np.asarray(row)
        rows.append(
            [str(layer), f"{kept.sum():,}", percent(kept.mean() / d_expert), f"{kept.min():,}",
             f"{kept.max():,}", str((kept == 0).sum()), percent(covered)]
        )  # fmt: skip
    header = ["layer", "channels kept", "share kept", "narrowest expert", "widest expert",
              "empty experts", "score covered"]  # fmt: skip
    note = f"Score covered: share of the layer's {criterion} score that the kept channels hold."
    if "model" in concentration:  # unknown to earlier versions
        header += ["Gini", "hold 90%"]
        numbers = zip(concentration["gini"], concentration["fraction_holding"], strict=True)
        for row, (uneven, fraction) in zip(rows, numbers, strict=True):
            row += [f"{uneven:.3f}", percent(fraction)]
        note += (
            " Gini: how unevenly the layer's channels share it, 0 if all have as much, 1 if one "
            "has all. Hold 90%: the least share of them that holds nine tenths of it."
        )
    return TextTable("Layer by layer", header, rows, note)


def allocation_table(plan: Part, sizes: Part, model: Part, concentration: Part) -> TextTable:
    """Parameters; coverage of the planner, its aligned widths and the optimum; how concentrated the
    score is; unusual experts."""
    policy = str(plan.get("width", "free"))
    rows = [*_parameters(sizes, model), ["width policy", policy, POLICIES.get(policy, "")]]
    if bits := plan.get("layer_bits"):
        each = ", ".join(f"{n} with {one}" for one, n in sorted(Counter(bits).items()))
        rows.append(["bits of layers", each, f"from the first up: {' '.join(map(str, bits))}"])
    if "coverage_optimum" in plan:
        before, aligned, optimum = (
            plan[f"coverage_{name}"] for name in ("before", "aligned", "optimum")
        )
        rows += [
            ["coverage wanted", f"{before:.4f}", "before widths became whole blocks"],
            ["coverage reached", f"{aligned:.4f}", f"alignment {plan.get('align', 'paper')!r}"],
            ["coverage of the optimum", f"{optimum:.4f}", "best free widths in whole blocks"],
            ["gap to the optimum", f"{optimum - aligned:.4f}", "of the weighted score"],
        ]
    if of_model := concentration.get("model"):  # unknown to earlier versions
        held = f"{percent(of_model['fraction_holding'])} of the channels hold 90% of the score"
        rows.append(["Gini of the score", f"{of_model['gini']:.3f}", held])
    starved = plan.get("starved_experts", [])
    share = plan.get("starved_share", 0.0)
    named = ", ".join(f"{layer}.{expert}" for layer, expert in starved[:NAMED])
    more = f" and {len(starved) - NAMED} more" if len(starved) > NAMED else ""
    channels = plan.get("super_channels", [])
    shown = ", ".join(".".join(map(str, one)) for one in channels[:NAMED])
    rows += [
        ["emptied experts", str(plan.get("emptied_experts", 0)), "keep no channel"],
        ["harmful experts", str(plan.get("harmful_experts", 0)), "negative attribution"],
        ["starved experts", str(len(starved)),
         f"fewer than 32 routed tokens, {share:.1%} of all; {named or 'none'}{more}"],
        ["super-channels", str(len(channels)),
         f"{plan.get('super_channels_removed', 0)} of them removed; {shown or 'none'}"],
    ]  # fmt: skip
    note = (
        "Coverage: share of the channel score that is kept, experts weighted as the planner does. "
        "Super-channels have a score or energy above 1000 times their layer's median and 1% of its "
        "total; they are kept wherever the width policy allows. Named by layer.expert(.channel)."
    )
    return TextTable("Allocation", ["what", "value", "detail"], rows, note)


def _parameters(sizes: Part, model: Part) -> list[list[str]]:
    left = min(size["parameters"] for size in sizes["exports"].values())
    rows = [["parameters", millions(left), f"of {millions(model['parameters'])}"]]
    if active := sizes.get("active_parameters"):  # unknown to earlier versions
        met = f"of {millions(active['source'])} that a token meets on average"
        rows.append(["active parameters", millions(active["exports"]), met])
    known = ((name, size.get("active_bytes")) for name, size in sizes["exports"].items())
    read = {name: size for name, size in known if size is not None}
    if read:
        listed = "; ".join(f"{name} {amount(size)}" for name, size in read.items())
        rows.append(["active bytes", amount(min(read.values())), f"that a token reads: {listed}"])
    return rows
