"""The options of `recover`, and the schedules that have a name."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from convert.export_format import FormatName
from moe_jax.errors import InputError
from pruning.recipe.group import About, Options
from pruning.recipe.options import MOST_BATCH, TEXT_FILES
from pruning.recipe.values import check_share

DEFAULT_TOKENS = 1_000_000
DEFAULT_WINDOW = 512
# What a preset leaves to the kind of training, which needs other steps for other weights, and to
# the model: these did best on one of this width.
RATES = {"router": 1e-3, "lora": 2e-3, "dora": 2e-3, "full": 1e-3}
RATED_WIDTH = 256
PRESETS: dict[str, dict[str, Any]] = {
    "distil": {"train": "full", "epochs": 3, "next_token": 0.0},
    # arXiv:2606.18304: the adapters' rate, the router's, and instruction data twice.
    "paper": {
        "train": "dora",
        "epochs": 2,
        "next_token": 1.0,
        "learning_rate": 1e-4,
        "router_learning_rate": 1e-6,
    },
}


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(Options):
    """Recovery: the text, what is trained on it, and how.

    Raises:
      InputError: an option is of another type, out of range, or contradicts another.
    """

    text: Annotated[
        tuple[str, ...],
        About(
            "text files to train on, FILE or FILE=WEIGHT, with :field=NAME or "
            f":template='{{NAME}}\\n{{NAME}}' behind; {TEXT_FILES}",
            shown="FILE",
        ),
    ]
    output: Annotated[str, About("folder to write", shown="FOLDER")]
    overwrite: Annotated[bool, About("replace an output folder of `recover`")] = False
    tokens: Annotated[
        int | None,
        About("most tokens of text, such as 300K or 10M, a sixteenth of which is only measured "
              "on (default 1M)", least=1, shown="N"),
    ] = None  # fmt: skip
    text_field: Annotated[str, About("field of rows that holds the text", shown="FIELD")] = "text"
    loss_on: Annotated[
        Literal["all", "answers"],
        About('tokens of conversations that are learnt: "answers" leaves the prompts out'),
    ] = "all"
    window: Annotated[
        int | None,
        About(f"tokens per window (default: the context, at most {DEFAULT_WINDOW})", least=2),
    ] = None
    train: Annotated[
        Literal["router", "lora", "dora", "full"] | None,
        About("what changes: the routers alone; adapters of the routed experts, with dora and a "
              "trained length of each row, and the routers by a rank of their own; or all weights "
              "of both (default full, with preset paper dora)"),
    ] = None  # fmt: skip
    mode: Annotated[
        Literal["model", "layer"],
        About("train the whole student in memory, or one layer after the other against the dense "
              "model's, where it does not fit"),
    ] = "model"  # fmt: skip
    preset: Annotated[
        Literal["distil", "paper"],
        About("schedule where no option says otherwise: distil learns what the dense model "
              "predicts, paper the next token at the published learning rates, twice"),
    ] = "distil"  # fmt: skip
    next_token: Annotated[
        float | None,
        About("share of the next-token loss at the last step; the rest is the KL divergence from "
              "the dense model (default 0, with preset paper 1)"),
    ] = None  # fmt: skip
    next_token_from: Annotated[
        float | None, About("that share at the first step (default the same)")
    ] = None
    top: Annotated[
        int, About("tokens of the dense model's prediction that are kept", least=1, most=4096)
    ] = 64
    epochs: Annotated[
        int | None, About("times that the text is seen (default 3, with preset paper 2)", least=1)
    ] = None
    learning_rate: Annotated[
        float | None,
        About(
            "of the experts, or of the routers alone (default 1e-3, of adapters 2e-3, but for "
            "routers alone less where the model is wider than 256, in proportion; with preset "
            "paper 1e-4 and for routers 1e-6)"
        ),
    ] = None
    router_learning_rate: Annotated[
        float | None,
        About(
            "of the routers beside experts (default the same, less for routers whose weights are "
            "smaller than 0.05, as their root mean square, in proportion)"
        ),
    ] = None
    rank: Annotated[int, About("rank of the experts' adapters", least=1, most=4096)] = 32
    alpha: Annotated[float, About("their product counts alpha / rank")] = 128.0
    router_rank: Annotated[
        int | None,
        About("rank of the routers' change, 0 for whole matrices (default 4 beside adapters)",
              least=0, most=4096),
    ] = None  # fmt: skip
    attention_rank: Annotated[
        int, About("rank of adapters of attention, at half the rate; 0 for none", least=0,
                   most=4096)
    ] = 0  # fmt: skip
    fixed_norm: Annotated[
        bool, About("take the norm of adapted rows for constant in gradients, which is cheaper")
    ] = False
    balance: Annotated[
        float | None,
        About("factor of the load-balance loss (default 0.001, 0 for routers that biases balance)"),
    ] = None
    batch: Annotated[int, About("windows at once", least=1, most=MOST_BATCH)] = 8
    accumulate: Annotated[
        int, About("batches per step, whose gradients are added up", least=1, most=MOST_BATCH)
    ] = 1
    patience: Annotated[
        int | None,
        About("of ten measurements of the held-out loss, how many in a row without a better one "
              "end the training (default: it ends with the text)", least=1),
    ] = None  # fmt: skip
    remat: Annotated[
        bool, About("compute layers twice instead of keeping what is in them (default true)")
    ] = True
    quantize_aware: Annotated[
        bool, About("round to 4 bits while training, so that the int4 export is what was trained")
    ] = False
    export: Annotated[
        tuple[FormatName, ...],
        About("formats to write (default those of the run)", shown="FORMAT"),
    ] = ()
    adapter: Annotated[
        bool,
        About(
            "also write what was trained as an adapter of PEFT for the run's padded-bf16 "
            "export, in the folder adapter/; with lora, or routers by a rank"
        ),
    ] = False
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        About(
            "type of the activations; trained weights are float32. bfloat16 is about three times "
            "faster on accelerators and on processors with AMX"
        ),
    ] = "float32"
    scratch: Annotated[
        str | None,
        About("folder for what the dense model predicts; default the output folder",
              shown="FOLDER"),
    ] = None  # fmt: skip
    keep_predictions: Annotated[
        bool,
        About("leave it in --scratch, where other recoveries on the same text and windows find it"),
    ] = False
    seed: Annotated[int, About("of the order of windows and the start of adapters", least=0)] = 0

    def check(self) -> None:
        """Raise InputError if there is no text, or a number is out of range."""
        if not self.text:
            raise InputError("there is no text to train on; name files with --text")
        if not self.output:
            raise InputError("output='' must name a folder")
        for name in ("learning_rate", "router_learning_rate", "alpha"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1e6:
                raise InputError(f"{name}={value} must be positive; choose e.g. 1e-3")
        for name in ("next_token", "next_token_from"):
            if value := getattr(self, name):
                check_share(name, value, "0 learns the dense model's predictions alone")
        if self.balance is not None and not 0 <= self.balance < 1e3:
            raise InputError(f"balance={self.balance} must not be negative; choose e.g. 0.001")
        if self.keep_predictions and self.scratch is None:
            raise InputError(
                "keep_predictions leaves them in a folder that other recoveries share; name it "
                "with --scratch"
            )
        if self.mode == "layer":
            self._check_layers()

    def _check_layers(self) -> None:
        """Raise InputError at what means nothing where each layer learns the dense one's output."""
        if self.keep_predictions:
            raise InputError(
                "keep_predictions=True, and mode='layer' predicts nothing; leave one of the two out"
            )
        if self.attention_rank:
            raise InputError(
                f"attention_rank={self.attention_rank} trains attention, which mode='layer' does "
                "not; leave one of the two out"
            )
        given = {"next_token": self.next_token, "next_token_from": self.next_token_from,
                 "loss_on": None if self.loss_on == "all" else self.loss_on}  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise InputError(
                    f"{name}={value!r} is about predicted tokens, and mode='layer' predicts none: "
                    "each layer learns the dense one's output; leave one of the two out"
                )

    def filled(self) -> "RecoverOptions":
        """The options with what the preset and the kind of training decide; a learning rate that
        goes by the model stays None, see `usual_rate`."""
        preset = dict(PRESETS[self.preset])
        train = self.train or preset["train"]
        if train == "router" and self.learning_rate is not None:
            preset.pop("router_learning_rate", None)  # one rate is asked for, and trains alone
        if self.mode == "layer":
            preset.pop("next_token")  # nothing is predicted there
        values = {name: value for name, value in preset.items() if getattr(self, name) is None}
        one = dataclasses.replace(self, **values)
        given: dict[str, Any] = {"tokens": one.tokens or DEFAULT_TOKENS}
        if train == "router" and self.learning_rate is not None:
            given["router_learning_rate"] = one.router_learning_rate or one.learning_rate
        if one.next_token_from is None:
            given["next_token_from"] = one.next_token
        if one.router_rank is None:
            given["router_rank"] = 4 if one.train in ("lora", "dora") else 0
        return dataclasses.replace(one, **given)

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model's predictions are learnt at all; of filled options."""
        return self.next_token != 1 or self.next_token_from != 1

    @property
    def scratch_folder(self) -> Path:
        """Where the predictions lie."""
        return Path(self.scratch or self.output)


def usual_rate(train: str, width: int) -> float:
    """The learning rate of a training for which none is named.

    Adam moves all weights equally far, so that what a row of them gives changes with its inputs:
    wider models take smaller steps. Routers, whose rates go by the size of their weights, do not.

    Args:
      train: kind of training.
      width: of the model's hidden states.

    Returns:
      Two digits of it.

    Source: arXiv:2203.03466, table 3.
    """
    narrow = 1.0 if train == "router" else min(1.0, RATED_WIDTH / width)
    return float(f"{RATES[train] * narrow:.2g}")
