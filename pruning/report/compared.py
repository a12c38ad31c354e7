"""What a comparison holds of a rule: a result, and the line of a table made of several."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pruning.kit.words import megabytes

Repaired = Literal["", "expert", "layer"]
UNPRUNED = "unpruned"  # in the place of a rule: fewer bits alone
CHOSEN = "auto"  # the same: whichever rule planner auto takes
MERGED = "merged experts"  # the family of rows that merge experts
COPIES = (
    "Merged experts count once: a class of models whose experts share no weights holds copies of "
    "them, unless the router is cut as well."
)
AUTO = 0  # in the place of bits: each layer has its own


@dataclass(frozen=True)
class Result:
    """What one rule gave at one prune rate with one seed, or why it could not.

    Attributes:
      rule, rate, seed: what was run; `rate` is the one really kept.
      repair: how what is kept was repaired without training; empty if it was not.
      kept: channels, equal for all rules at a rate.
      emptied: experts without channels, or merged into others.
      quality: text -> nll, perplexity, tokens, kl, top1.
      reason: why there is no plan; empty if there is one.
      family, about: of the rule, see `pruning.budget.rule.Rule`; empty in a file of an earlier
        version.
      bits: of the weights; fewer than 16 are rounded to nearest. `AUTO` where each layer has its
        own, which `layer_bits` are for every layer of the model; `layer_shares` are those of its
        channels that are kept.
      target: bytes that the folder may take, where the rate comes from; 0 if a rate was asked for.
      bytes: of the folder that the plan would be written as; 0 in a file of an earlier version.
      draw: which draw of the calibration text the plan is of; 0 is the text itself.
      overlap: Jaccard index of the channels that are kept with those that the same rule keeps of
        the text itself.
      top_k, skip_below: to which of their experts tokens go, see `shrink.fewer_experts.Fewer`; 0
        and 0 where they go to all that the router picks.
      calibration: the set of calibration text that the plan is of; "" is the text itself.
      cut: whether the router knows but the experts that keep something.
      parameters: weights of the model, padding not counted.
      tasks: what `measure.paired.Paired` says of each task and metric, beside the dense model;
        empty if no task was asked.
      active, active_bytes: weights that a token meets on average, and what they take as written;
        these three are 0 in a file of an earlier version.
    """

    rule: str
    rate: float
    seed: int = 0
    repair: Repaired = ""
    kept: int = 0
    emptied: int = 0
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    reason: str = ""
    family: str = ""
    about: str = ""
    bits: int = 16
    target: int = 0
    bytes: int = 0
    draw: int = 0
    overlap: float = 1.0
    top_k: int = 0
    skip_below: float = 0.0
    calibration: str = ""
    cut: bool = False
    parameters: int = 0
    active: int = 0
    active_bytes: int = 0
    tasks: list[dict[str, Any]] = field(default_factory=list)
    layer_bits: list[int] = field(default_factory=list)
    layer_shares: list[float] = field(default_factory=list)

    @property
    def is_of_text(self) -> bool:
        """Whether the plan is of the calibration text itself, no draw of it and no other set."""
        return not self.draw and not self.calibration

    @property
    def has_fewer(self) -> bool:
        """Whether tokens go to fewer experts than the router picks."""
        return self.top_k > 0

    @property
    def name(self) -> str:
        """Of the rule, or of what tokens go to, what is done beside it, and bits if few."""
        rule = self.rule
        if self.has_fewer:
            rule = f"skip-{self.skip_below:g}" if self.skip_below else f"top-{self.top_k}"
        rule = f"{rule}+cut" if self.cut else rule
        repaired = f"{rule}+{self.repair}" if self.repair else rule
        words = {16: "", AUTO: " auto bits"}
        return repaired + words.get(self.bits, f" {self.bits}-bit")

    @property
    def place(self) -> str:
        """The prune rate or the size that it was to keep."""
        return f"{megabytes(self.target)} MB" if self.target else f"{self.rate:.4g}"


def bits_word(bits: int) -> str:
    """How many bits, in tables."""
    return "auto" if bits == AUTO else str(bits)


@dataclass(frozen=True)
class Line:
    """One rule at one rate, repaired or not, texts and seeds averaged with equal weight.

    Attributes:
      rule: `Result.name`.
      added: nats per token above the dense model.
      of_random: `added` divided by what random channels add at this rate in these bits; nan if not
        measured.
      spread: half the distance between the best and the worst seed.
      kl: nats per token.
      top1: share of positions whose most likely token is the dense model's.
      emptied: experts without channels.
      family, about: of the rule.
      bits, target, has_fewer: as of the results.
      bytes, parameters, active, active_bytes: the same, means over seeds.
    """

    rule: str
    rate: float
    added: float
    of_random: float
    spread: float
    kl: float
    top1: float
    emptied: float
    family: str
    about: str
    bits: int
    target: int
    bytes: float
    has_fewer: bool
    parameters: float
    active: float
    active_bytes: float
