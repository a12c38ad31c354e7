"""The options of `eval` that are about what a model writes by itself."""

from dataclasses import dataclass
from typing import Annotated

from pruning.recipe.group import About, Options


@dataclass(frozen=True, kw_only=True)
class HealthOptions(Options):
    """Continuations, instead of the likelihood of text."""

    generate: Annotated[
        int,
        About(
            "continue N beginnings of 32 tokens of the texts, and N short sums, the likeliest "
            "token each time: how many are truncated, how much repeats, how sure the model is, "
            "how long it follows the dense one, how many sums are right; the weights are read once "
            "for every new token",
            least=1,
            shown="N",
        ),
    ]
    new_tokens: Annotated[int, About("most tokens of a continuation", least=1, shown="N")] = 64
