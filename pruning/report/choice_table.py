"""The rules that planner auto measured, as a table of the report, the page, the card and `plan`."""

from collections.abc import Mapping
from typing import Any

from moe_jax.errors import InputError
from pruning.measure.choice import MARGIN
from pruning.report.table import TextTable

COLUMNS = 4  # texts beyond these are shown by the worst of them


def choice_table(choice: Mapping[str, Any], columns: int = COLUMNS) -> TextTable:
    """What every rule adds to the loss of the dense model, and which one is taken.

    Args:
      choice: of a plan's provenance, see `pruning.stages.choose`.
      columns: most texts that have a column each; of more the worst is shown.

    Raises:
      InputError: it is damaged.
    """
    try:
        return _table(choice, columns)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        told = str(error)[:200]
        raise InputError(f"the plan's table of rules is damaged ({told}); plan again") from None


def _table(choice: Mapping[str, Any], columns: int) -> TextTable:
    texts = list(choice["dense"])
    each = texts if 1 < len(texts) <= columns else []
    worst = ["worst text"] if len(texts) > columns else []
    rows = []
    for one in choice["candidates"]:
        added = one["added"]
        cells = [f"{added[text]:+.4f}" for text in each]
        if worst:
            name = max(added, key=added.__getitem__)
            cells.append(f"{added[name]:+.4f} {name}")
        word = "taken" if one["taken"] else "tied" if one["tied"] else ""
        rows.append([one["rule"], f"{one['mean']:+.4f}", *cells, word])
    blank = [""] * (1 + len(each) + len(worst))
    rows += [[one["rule"], *blank, f"not measured: {one['reason']}"] for one in choice["refused"]]
    kept = choice["kept_out"]
    how = "channels removed and weights as they are"
    if choice.get("repaired"):
        how = (
            "once each expert's kept channels have taken over what they can, by a sample of the "
            "text: what a repair begins with"
        )
    note = (
        f"+nats: loss per token that a rule's plan adds to the dense model, {how}, by "
        f"{kept['predictions']:,} predictions in {kept['windows']:,} windows of calibration text "
        "that no statistic saw. The least is taken"
    )
    if len(texts) > 1:
        note += (
            f"; of rules that tie with it (apart by no more than chance and {MARGIN:.0%}), the one "
            "whose worst text is best"
        )
    rate = choice["asked"].get("prune_rate")
    title = "Rules measured" + ("" if rate is None else f" at prune rate {rate}")
    shown = f"+nats, {'repaired' if choice.get('repaired') else 'masked'}"
    return TextTable(title, ["rule", shown, *each, *worst, ""], rows, f"{note}.")
