"""The options of `paper` beside those of `compare`: recovery, and the figure of throughput."""

from dataclasses import dataclass
from typing import Annotated, Literal

from moe_jax.errors import InputError
from pruning.recipe.group import About, Options
from pruning.recipe.options import TEXT_FILES
from pruning.recipe.recover_options import DEFAULT_TOKENS, RecoverOptions

BLOCKS = (1, 8, 16, 32, 64, 128)  # of figure 10, those that divide an expert's width


@dataclass(frozen=True, kw_only=True)
class PaperOptions(Options):
    """Recovery of every pruned model, and the blocks of figure 10."""

    recover: Annotated[
        Literal["none", "router", "lora", "dora", "full"],
        About("what `recover` trains of each pruned model, for rows of its own; dora is the "
              "paper's kind and fits where full, which brings back most, does not; none leaves "
              "these rows out"),
    ] = "dora"  # fmt: skip
    recover_text: Annotated[
        tuple[str, ...],
        About(f"text files to train on, as of --calibration, the default; {TEXT_FILES}",
              shown="FILE"),
    ] = ()  # fmt: skip
    recover_tokens: Annotated[
        int | None,
        About("most tokens of that text, such as 300K or 10M (default 1M)", least=1, shown="N"),
    ] = None
    recover_preset: Annotated[
        Literal["distil", "paper"],
        About("schedule of the training, as of `recover`: distil learns what the dense model "
              "predicts, paper the next token at the published learning rates"),
    ] = "distil"  # fmt: skip
    recover_mode: Annotated[
        Literal["model", "layer"],
        About("train whole models in memory, or one layer after the other, where they do not fit"),
    ] = "model"
    blocks: Annotated[
        tuple[int, ...],
        About("channels that widths are multiples of in figure 10, each of which divides the "
              f"width of an expert (default those of {', '.join(map(str, BLOCKS))} that do)",
              shown="N"),
    ] = ()  # fmt: skip

    def check(self) -> None:
        """Raise InputError if a block holds no channel, or training is described and not asked."""
        if wrong := [one for one in self.blocks if one < 1]:
            raise InputError(f"blocks={wrong} must be at least 1; choose e.g. 1 16 64")
        told = {"recover_text": self.recover_text, "recover_tokens": self.recover_tokens}
        given = [name for name, value in told.items() if value]
        if self.recover == "none" and given:
            raise InputError(
                f"{given[0]} is about training, which recover='none' leaves out; leave one of the "
                "two out"
            )

    def training(self, text: tuple[str, ...], output: str) -> RecoverOptions:
        """The options of `recover` for one of the models, its formats left open.

        Args:
          text: files to train on.
          output: its folder.
        """
        assert self.recover != "none"
        return RecoverOptions(
            text=text,
            output=output,
            tokens=self.recover_tokens or DEFAULT_TOKENS,
            train=self.recover,
            preset=self.recover_preset,
            mode=self.recover_mode,
        )
