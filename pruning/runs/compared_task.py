"""What one row of a comparison is asked to be."""

import dataclasses

from pruning.budget.merging import MERGES
from pruning.report.compared import AUTO, Repaired, Result
from pruning.shrink.fewer_experts import Fewer


@dataclasses.dataclass(frozen=True)
class Task:
    """One rule at one rate with one seed, repaired or not, its weights of so many bits.

    The rule is one of `RULES`, or of `MERGES`, or `UNPRUNED`. With bits `AUTO` the rate is
    0, whatever comes of it, for that is found with the bits.

    `target` are the bytes that its rate comes from, 0 if a rate was asked for; `draw` says which
    draw of the calibration text decides what is kept, 0 for the text itself. `top_k` and
    `skip_below` are those of `Fewer`, `top_k` 0 where tokens go to all experts of the router.
    `calibration` names the set whose text decides what is kept, "" is the calibration text. `cut`
    says whether the router knows but the experts that keep something.
    """

    rule: str
    rate: float
    seed: int = 0
    repair: Repaired = ""
    bits: int = 16
    target: int = 0
    draw: int = 0
    top_k: int = 0
    skip_below: float = 0.0
    calibration: str = ""
    cut: bool = False

    @property
    def is_merged(self) -> bool:
        """Whether experts are merged, and no channels removed."""
        return self.rule in MERGES

    @property
    def is_of_other_text(self) -> bool:
        """Whether a draw of the calibration text, or a set beside it, decides what is kept."""
        return self.draw > 0 or self.calibration != ""

    @property
    def fewer(self) -> Fewer | None:
        """To which of their experts tokens go; None for all."""
        return Fewer(self.top_k, self.skip_below) if self.top_k else None


def task_of(result: Result) -> Task:
    """What a result is of."""
    found = Task(*(getattr(result, field.name) for field in dataclasses.fields(Task)))
    return dataclasses.replace(found, rate=0.0) if found.bits == AUTO else found
