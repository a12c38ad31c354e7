"""How bad a loss is, in one word, by a scale that the page states."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["small", "noticeable", "severe"]


@dataclass(frozen=True)
class Scale:
    """Where the words begin.

    Attributes:
      noticeable: added nats per token from which a loss is no longer small; 0.05 make a text's
        perplexity 5% larger.
      severe: added nats per token from which it is severe; 0.25 make it 28% larger.
      chance: share of what random channels lose from which a loss that is not small is severe,
        because choosing the channels hardly helped.
    """

    noticeable: float = 0.05
    severe: float = 0.25
    chance: float = 0.8

    def words(self) -> str:
        """The scale in a sentence."""
        return (
            f"small: less than {self.noticeable:g} nats per token are added; severe: "
            f"{self.severe:g} or more, or, where it is not small, at least {self.chance:.0%} of "
            "what random channels add; noticeable: all between."
        )


SCALE = Scale()


def severity(added: float, of_random: float | None = None, scale: Scale = SCALE) -> Severity:
    """The word for a loss.

    Args:
      added: nats per token above the dense model.
      of_random: what the choice of channels adds over what random channels add, both before
        rounding; None if that was not measured or random channels add nothing.
      scale: thresholds.
    """
    if added < scale.noticeable:
        return "small"
    by_chance = of_random is not None and of_random >= scale.chance
    return "severe" if added >= scale.severe or by_chance else "noticeable"
