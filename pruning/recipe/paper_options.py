"""The options of `paper` that no other command has: its recovery and its second figure."""

from dataclasses import dataclass
from typing import Annotated, Literal

from moe_jax.errors import InputError
from pruning.recipe.group import About, Options
from pruning.recipe.options import TEXT_FILES
from pruning.recipe.values import check_whole

BLOCKS = (1, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class PaperOptions(Options):
    """Recovery, and the figures."""

    recover: Annotated[
        Literal["none", "router", "dora", "full"],
        About(
            "what recover trains of every plan, as its --train: dora, adapters of the experts and "
            "the routers, is what the paper trains; none leaves the second half of the tables out"
        ),
    ] = "dora"
    recover_tokens: Annotated[
        int | None,
        About(
            "most tokens of text that every plan is trained on, such as 300K, seen three times "
            "(default 1M)",
            least=1,
            shown="N",
        ),
    ] = None
    recover_text: Annotated[
        tuple[str, ...],
        About(f"text files to train on (default those of --calibration); {TEXT_FILES}",
              shown="FILE"),
    ] = ()  # fmt: skip
    recover_mode: Annotated[
        Literal["model", "layer"],
        About("train the whole student in memory, or one layer after the other where it does not "
              "fit, as recover's --mode"),
    ] = "model"  # fmt: skip
    figure_blocks: Annotated[
        tuple[int, ...],
        About(
            "widths of experts are multiples of these in figure 10, which times one layer of the "
            "model on this machine",
            shown="N",
        ),
    ] = BLOCKS

    def check(self) -> None:
        """Raise InputError if a block is none, or a text is named that nothing trains on."""
        for block in self.figure_blocks:
            check_whole("figure_blocks", block, 1)
        given = {"recover_text": self.recover_text, "recover_tokens": self.recover_tokens}
        for name, value in given.items():
            if self.recover == "none" and value:
                raise InputError(
                    f"{name}={value} is for a training, and recover='none' trains nothing; leave "
                    "one of the two out"
                )
