"""A recovery opened, and what can be said of it before any work."""

import dataclasses
import socket
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from convert.export_format import ExportFormat
from moe_jax.errors import InputError
from moe_jax.spread import Spread
from pruning.demo import demo_texts
from pruning.kit.memory import free_memory
from pruning.kit.progress import Steps
from pruning.kit.words import amount, duration
from pruning.recipe.options import EVALUATION_TOKENS
from pruning.recipe.recover_options import DEFAULT_WINDOW, RecoverOptions, usual_rate
from pruning.recipe.values import window_within
from pruning.recovery.course import ROUTER_SIZE, FitOptions
from pruning.recovery.deltas import DeltaConfig
from pruning.recovery.loss import predicted
from pruning.recovery.teacher import prediction_bytes
from pruning.report.card import Recovery
from pruning.stages.adapter import check_adapter
from pruning.stages.measure import open_texts
from pruning.stages.preflight import require_space
from pruning.stages.recovered import (
    Student,
    delta_config,
    fit_options,
    forms_of,
    open_student,
)
from pruning.stages.recovery_sizes import CHECKPOINT, needed_memory
from pruning.stages.sizes import export_of
from pruning.text.calibration import TokenBatch, calibration_batch, hold_out
from pruning.text.held_out import MUCH, RUN, seen_shares
from pruning.text.source import TextSource
from pruning.text.tokenizer import TextCodec, open_codec
from pruning.text.windows import Windows


@dataclass(frozen=True)
class RecoverJob:
    """A recovery opened: what is trained, on what, how, and what is written.

    Attributes:
      options: filled.
      student: what is trained.
      codec: its tokenizer.
      text, held: windows to train on and to measure on.
      evaluation: the run's evaluation texts by name, or the windows that are held out.
      forms: the formats to write, by name.
      deltas: which weights change.
      how: the schedule.
      window: tokens.
    """

    options: RecoverOptions
    student: Student
    codec: TextCodec
    text: TokenBatch
    held: TokenBatch
    evaluation: dict[str, Windows]
    forms: dict[str, ExportFormat]
    deltas: DeltaConfig
    how: FitOptions
    window: int

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.options.output)

    @property
    def learns_predictions(self) -> bool:
        """Whether the dense model's predictions on the text are needed."""
        return self.options.mode == "model" and self.options.needs_teacher

    def card_rows(self, training: dict[str, Any]) -> Recovery:
        """What a card says of the training, and of what it took."""
        options, how = self.options, self.how
        assert options.train is not None
        what = {
            "router": "the routers",
            "lora": f"LoRA adapters of rank {options.rank}, merged, and the routers",
            "dora": f"DoRA adapters of rank {options.rank}, merged, and the routers",
            "full": "all weights of the routed experts, and the routers",
        }
        if options.mode == "layer":
            loss = "each layer's residual stream against the dense model's"
        elif options.needs_teacher:
            loss = f"KL divergence from the dense model ({options.top} tokens of each prediction)"
            if options.next_token or options.next_token_from:
                loss += f", next token {options.next_token_from:g} to {options.next_token:g}"
        else:
            loss = "next token"
        files = ", ".join(
            f"{Path(one['path']).name} ({one['tokens']:,} tokens)" for one in self.text.sources
        )
        rows = [
            ["trained", f"{what[options.train]}: {training['parameters']:,} parameters"],
            ["loss", loss],
            ["text", f"{files}; {self.text.total:,} tokens, {how.epochs} times"],
            ["learning rate", f"{how.learning_rate:g}, {self._router_rate}; AdamW, cosine"],
            ["took", duration(training["seconds"])],
        ]  # fmt: skip
        if options.attention_rank:
            kind = "LoRA" if options.train == "lora" else "DoRA"
            rows.append(["attention", f"{kind} adapters of rank {options.attention_rank}, merged"])
        if options.quantize_aware:
            rows.append(["rounding", "to 4 bits in every step of the training"])
        if seen := self.seen_words:
            rows.append(["not held out", f"training has seen at least {seen}"])
        return rows

    @property
    def _router_rate(self) -> str:
        rate, how = self.how.router_rate, self.how
        if rate is None:
            return f"of routers the same, less where their weights are below {ROUTER_SIZE:g}"
        return f"of routers {how.learning_rate * rate:g}"

    @cached_property
    def seen(self) -> dict[str, float | None]:
        """Share of each evaluation text that is trained on."""
        return seen_shares(self.text, self.evaluation)

    @property
    def seen_words(self) -> str:
        """The evaluation texts of which much is trained on; "" if there are none."""
        shares = self.seen.items()
        much = [f"{one:.0%} of {name}" for name, one in shares if (one or 0) >= MUCH]
        return f"{', '.join(much)} (runs of {RUN} tokens)" if much else ""

    @property
    def evaluated(self) -> dict[str, int]:
        """Window and stride of the evaluation, as cards have them."""
        texts = self.evaluation.values()
        return next(({"window": one.window, "stride": one.stride} for one in texts), {})


def open_recovery(folder: Path, options: RecoverOptions, steps: Steps) -> RecoverJob:
    """Open and check all that a recovery needs.

    Args:
      folder: output of `compress` or `apply`, or one of its exports.
      options: filled.
      steps: where progress goes.

    Raises:
      InputError: whatever is wrong with the folder, the text or the options, before any work.
    """
    student = open_student(folder, steps)
    config = student.base.config
    window = window_within(options.window or min(DEFAULT_WINDOW, config.max_position),
                           config.max_position)  # fmt: skip
    codec = open_codec(
        student.base.about.folder, config.vocab_size, first_tokens=student.recipe.first_tokens
    )
    text, held = training_text(options, codec, window)
    forms = forms_of(student, options)
    if options.adapter:
        check_adapter(student, options)
    assert options.train is not None
    options = dataclasses.replace(
        options,
        # The rest of a prediction is an outcome of its own, so one token at least must be left.
        top=min(options.top, config.vocab_size - 1),
        learning_rate=options.learning_rate or usual_rate(options.train, config.d_model),
    )
    return RecoverJob(
        options, student, codec, text, held, _evaluation(student, codec, held, window), forms,
        delta_config(options, forms), fit_options(options, student.source), window,
    )  # fmt: skip


def training_text(
    options: RecoverOptions, codec: TextCodec, window: int
) -> tuple[TokenBatch, TokenBatch]:
    """Windows of so many tokens to train on, and those that are only measured on.

    Raises:
      InputError: a file cannot be read, or holds too little.
    """
    batch = calibration_batch(
        [TextSource.parse(file, options.text_field) for file in options.text],
        codec.encode,
        length=window,
        max_tokens=options.tokens or 0,
        separator=codec.end,
        first=codec.first,
        answers=codec.answers if options.loss_on == "answers" else None,
    )
    text, held = hold_out(batch)
    if not predicted(text.valid, text.counted).any():
        raise InputError("the text has no token to learn: no answer is in the part that is read")
    return text, held


def _evaluation(
    student: Student, codec: TextCodec, held: TokenBatch, window: int
) -> dict[str, Windows]:
    recipe = student.recipe
    files = recipe.evaluation or (demo_texts("evaluation") if recipe.model == "demo" else ())
    texts, _ = open_texts(
        files, codec, window, recipe.evaluation_tokens or EVALUATION_TOKENS,
        recipe.calibration_field, recipe.loss_on,
    )  # fmt: skip
    wanted = predicted(held.valid, held.counted)[:, :-1]
    if not texts and wanted.any():
        texts["held-out text"] = Windows(held.tokens, held.valid, wanted, window, window)
    return texts


def check_recovery(run: RecoverJob, steps: Steps, spread: Spread, is_predicted: bool) -> None:
    """Say what the run takes, and refuse what does not fit in memory or on the disk.

    Args:
      run: the recovery.
      steps: where it is said.
      spread: devices and processes that share it.
      is_predicted: whether the dense model's predictions are there.
    """
    base, windows = run.student.base, len(run.text.tokens) + len(run.held.tokens)
    parts = {
        name: export_of(base.about, run.student.plan, form).nbytes
        for name, form in run.forms.items()
    }
    if run.learns_predictions and not is_predicted:
        apart = run.options.scratch_folder != run.output  # where each process has its own
        size = prediction_bytes(windows, run.window, run.options.top)
        size = -(-size // spread.processes) if apart else size
        stay = "and stay there" if run.options.keep_predictions else "until the end"
        steps.say(
            f"the dense model's predictions take {amount(size)} in {run.options.scratch_folder} "
            f"{stay}"
        )
        if apart:
            require_space(run.options.scratch_folder, {"predictions": size})
        else:
            parts["predictions"] = size
    if run.seen_words:
        steps.say(
            f"what is trained on holds at least {run.seen_words}, so the loss there says little "
            "about other text"
        )
    parts["checkpoints"] = CHECKPOINT * _check_memory(run, steps, spread, windows)
    require_space(run.output, parts)


def _check_memory(run: RecoverJob, steps: Steps, spread: Spread, windows: int) -> int:
    """Numbers that are trained; says and refuses what that takes of memory, on a CPU the host's,
    which all devices and processes there take of, else that of a device."""
    source, stats = run.student.source, jax.local_devices()[0].memory_stats() or {}
    needed, trained = needed_memory(
        (source.layer(index) for index in range(len(source))), source.config, run.deltas,
        run.options, -(-windows // spread.processes) * run.window, run.window,
        spread.processes * spread.devices, spread.parts,
    )  # fmt: skip
    hosts = spread.told(socket.gethostname())
    if "bytes_limit" in stats:
        free, whose = stats["bytes_limit"] - stats.get("bytes_in_use", 0), "memory of each device"
    else:
        copies = spread.devices * spread.parts * hosts.count(socket.gethostname())
        needed, free, whose = copies * needed, free_memory(), "memory"
    steps.say(f"training takes about {amount(needed)} of {whose}, {amount(free)} are free")
    if needed > free and run.options.mode == "model":
        raise InputError(
            f"training the whole model takes about {amount(needed)} of {whose} and {amount(free)} "
            "are free; choose --train dora or router, which train less, add --mode layer, or a "
            "smaller --batch or --window"
        )
    return trained
