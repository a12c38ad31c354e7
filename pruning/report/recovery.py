"""What a recovery did, as a value, as recover.json and as a page."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from pruning.kit.fitting import misfits
from pruning.kit.words import duration, megabytes, millions, percent
from pruning.report.compression_tables import stages_table, verification_table
from pruning.report.drawing import BLUE, GREY, RED, figure_html, new_figure, plain
from pruning.report.html import document, section_html, text_html
from pruning.report.table import TextTable, as_rich

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME, PAGE = "recover.json", "recover.html"


@dataclass(frozen=True)
class RecoveryReport:
    """The schema of recover.json: these fields; all values are plain JSON.

    Losses are nats per token, times seconds, sizes bytes.

    Attributes:
      student: folder, model (the dense one's folder), fingerprint of the dense model, plan (hash),
        removed (share of the expert channels).
      options: every option with what preset and training decided.
      text: sources as of `TokenBatch`, tokens (trained on, each counted once), held_out (tokens).
      training: parameters (that were trained), steps, tokens_seen, seconds and peak_memory_bytes
        over all sessions of a training that was interrupted. Where layers were trained one after
        the other, steps and tokens are those of each if its patience lasts.
      history: in order of steps; step and either what was logged of the training (loss, its parts,
        gradient_norm, learning_rate) or held_out, the same parts on held-out windows. Where layers
        were trained one after the other: layer, before and after.
      quality: per text and model (dense, pruned, recovered, exports): nll, perplexity, tokens, kl,
        top1.
      exports: name -> bytes.
      verification: as of report.json.
      stages: name, seconds, peak_memory_bytes.
      environment: versions, date, device.
    """

    student: dict[str, Any]
    options: dict[str, Any]
    text: dict[str, Any]
    training: dict[str, Any]
    history: list[dict[str, Any]]
    quality: dict[str, dict[str, dict[str, Any]]]
    exports: dict[str, int]
    verification: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    environment: dict[str, Any]

    def left(self, model: str) -> float | None:
        """Share of the loss that pruning added which a model still has, mean over texts."""
        means = {
            name: sum(found[name]["nll"] for found in self.quality.values())
            for name in ("dense", "pruned", model)
        }
        added = means["pruned"] - means["dense"]
        return (means[model] - means["dense"]) / added if added > 0 else None

    def tables(self) -> list[TextTable]:
        """What people look at, most important first."""
        return [self._quality(), self._training(), verification_table(self.verification),
                stages_table(self.stages)]  # fmt: skip

    def _quality(self) -> TextTable:
        rows = []
        for text, models in self.quality.items():
            for name, one in models.items():
                kl, top1 = one["kl"], one["top1"]
                rows.append([
                    text if name == "dense" else "", name, f"{one['nll']:.4f}",
                    "" if kl is None else f"{kl:.4f}", percent(top1),
                ])  # fmt: skip
        shares = [
            f"{name} {percent(self.left(name))}"
            for name in next(iter(self.quality.values()), {})
            if name not in ("dense", "pruned") and self.left(name) is not None
        ]
        note = "pruned: before training. recovered: after it, in memory."
        if shares:
            note += f" Of the loss that pruning added is left: {', '.join(shares)}."
        header = ["text", "model", "nats per token", "KL", "same top token"]
        return TextTable("What came back", header, rows, note)

    def _training(self) -> TextTable:
        trained, options = self.training, self.options
        rows = [
            ["trained", f"{options['train']}, {millions(trained['parameters'])} parameters"],
            ["mode", options["mode"]],
            ["text", f"{self.text['tokens']:,} tokens, {options['epochs']} times"],
            ["held out", f"{self.text['held_out']:,} tokens"],
            ["steps", f"{trained['steps']:,}"],
            ["time", duration(trained["seconds"])],
            ["peak memory", f"{megabytes(trained['peak_memory_bytes'])} MB"],
        ]
        return TextTable("Training", ["", "value"], rows)

    def terminal_table(self) -> Group:
        """The tables for a terminal."""
        return Group(*map(as_rich, self.tables()))

    def save(self, folder: Path) -> None:
        """Write recover.html and, whose presence says that all is there, recover.json."""
        replace_text(folder / PAGE, recovery_page(self))
        replace_text(folder / NAME, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "RecoveryReport":
        """Read recover.json.

        Raises:
          InputError: it is not one.
        """
        values = read_json(path)
        known = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != known or misfits(cls, values):
            raise InputError(f"{path} is no report of `recover`; run it again with --overwrite")
        return cls(**values)


def recovery_page(report: RecoveryReport) -> str:
    """The whole page, which loads nothing from anywhere."""
    title = "What training brought back"
    parts = [text_html(title, "h1")]
    if any("loss" in row for row in report.history):
        caption = (
            "Above: loss of the training steps, and on held-out windows, which decides what is "
            "kept. Below: the learning rate."
        )
        parts.append(figure_html(plot_history(report.history), caption))
    return document(title, [*parts, *map(section_html, report.tables())])


def plot_history(history: list[dict[str, Any]]) -> "Figure":
    """Training and held-out loss by step, and the learning rate."""
    figure = new_figure(5.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    logged = [row for row in history if "loss" in row]
    held = [row for row in history if "held_out" in row]
    steps = [row["step"] for row in logged]
    above.plot(steps, [row["loss"] for row in logged], color=GREY, label="training")
    above.plot(
        [row["step"] for row in held], [row["held_out"]["loss"] for row in held],
        "o-", color=BLUE, markersize=4, label="held out",
    )  # fmt: skip
    above.set_ylabel("loss, nats per token")
    above.legend(frameon=False, loc="upper right")
    below.plot(steps, [row["learning_rate"] for row in logged], color=RED)
    below.set(xlabel="step", ylabel="learning rate")
    plain(above)
    plain(below)
    return figure
