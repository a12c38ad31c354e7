"""A model as lm-evaluation-harness asks it: log-likelihoods, rolling ones, and continuations.

Tokens, truncation and windows are those of the harness's own `hf` model, so that results are, too.
Importing this module needs lm_eval; no part of it imports torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe_jax.errors import InputError
from moe_jax.generation import generate
from moe_jax.stream import LayerSource
from pruning.kit.progress import Steps
from pruning.measure.answer_record import AnswerRecord, question_hash
from pruning.measure.answers import STEP_TOKENS, Answer, Question, answer, power_of_two
from pruning.measure.health import prompts_together
from pruning.text.tokenizer import TextCodec

NEW_TOKENS = 256  # where a task does not say
# Of generation_kwargs: what is heeded, and what only sampling would need.
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How a model is asked.

    Attributes:
      name: of the model, beside progress.
      max_length: most tokens that it reads at once.
      batch: rows of 2,048 tokens a step, or as many tokens in shorter rows.
      dtype: of the activations.
    """

    name: str
    max_length: int
    batch: int
    dtype: Any


@dataclass(frozen=True)
class _Prompt:
    """What is to be continued, by how many tokens at most, and before which words it ends."""

    tokens: tuple[int, ...]
    new: int
    until: tuple[str, ...]


class HarnessModel(TemplateLM):
    """A streamed model behind the interface of lm-evaluation-harness.

    Args:
      source: the model.
      codec: its tokenizer; whether texts begin with the tokens it puts first is said there.
      asked: how it is asked.
      record: of what it has answered.
      steps: where progress goes.
    """

    def __init__(
        self,
        source: LayerSource,
        codec: TextCodec,
        asked: Asked,
        record: AnswerRecord,
        steps: Steps,
    ):
        super().__init__()
        self._source, self._codec, self._asked = source, codec, asked
        self._record, self._steps = record, steps
        prefix = codec.begin if codec.begin is not None else codec.end
        self._prefix = None if prefix is None else codec.tokenizer.decode([prefix], False)

    # --- text and tokens ---

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token.

        Raises:
          InputError: the tokenizer names none.
        """
        if self._codec.end is None:
            raise InputError(
                f"{self._codec.folder} names neither a bos_token nor an eos_token, and a text "
                "without context is read behind one; write it into tokenizer_config.json"
            )
        return self._codec.end

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is read behind."""
        return self.eot_token_id if self._codec.begin is None else self._codec.begin

    @property
    def max_length(self) -> int:
        """Most tokens that are read at once."""
        return self._asked.max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, by default with those that the tokenizer puts first unless they are there."""
        special = add_special_tokens
        if special is None:
            begun = self._prefix is not None and string.startswith(self._prefix)
            special = bool(self._codec.first) and not begun
        return self._codec.encode(string, special=special)

    # --- what the harness asks ---

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """Log-probability in nats of every continuation, and whether it is the likeliest."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Answer]:
        most, questions, cut = self.max_length, [], 0
        for _, context, end in requests:
            if not 0 < len(end) <= most:
                raise InputError(
                    f"a continuation has {len(end)} tokens and the window {most}; leave its task "
                    "out, or choose a longer --window"
                )
            tokens = (*context, *end)[-(most + 1) :]
            cut += len(tokens) < len(context) + len(end)
            questions.append(Question(tuple(tokens), len(end)))
        if cut:
            self._steps.say(
                f"{self._asked.name}: {cut:,} of {len(questions):,} texts are longer than {most:,} "
                "tokens, and what stands first in them is left out"
            )
        keys = [question_hash("likelihood", one.tokens, one.scored) for one in questions]
        asked = list(self._unknown(keys).items())
        with self._steps.bar(f"{self._asked.name}: likelihood") as on_step:
            for found in answer(
                self._source,
                [questions[place] for _, place in asked],
                batch=self._asked.batch,
                dtype=self._asked.dtype,
                on_step=on_step,
            ):
                self._record.add({asked[i][0]: list(one) for i, one in found.items()})
        return [(self._record[key][0], self._record[key][1]) for key in keys]

    def _unknown(self, keys: list[str]) -> dict[str, int]:
        """Questions without an answer, each once, and where they are asked first."""
        places = {key: place for place, key in reversed(list(enumerate(keys)))}
        return {key: place for key, place in places.items() if key not in self._record}

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability in nats of every text, each token after as many as the window holds."""
        windows = [
            [
                (None, *make_disjoint_window(pair))
                for pair in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([one for some in windows for one in some]))
        return [sum(next(found)[0] for _ in some) for some in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The likeliest continuation of every context, up to where its task ends it."""
        prompts = [self._prompt(request) for request in requests]
        keys = [question_hash("continuation", p.tokens, p.new, p.until) for p in prompts]
        asked = [(key, prompts[place]) for key, place in self._unknown(keys).items()]
        asked.sort(key=lambda one: (one[1].new, one[1].until, -len(one[1].tokens)))
        done = 0
        with self._steps.bar(f"{self._asked.name}: continuations") as on_step:
            for _, alike in groupby(asked, lambda one: (one[1].new, one[1].until)):
                for some in self._together(list(alike)):
                    texts = self._continue([prompt for _, prompt in some])
                    self._record.add({key: t for (key, _), t in zip(some, texts, strict=True)})
                    done += len(some)
                    on_step(done, len(asked))
        return [self._record[key] for key in keys]

    # --- continuations ---

    def _prompt(self, request: Instance) -> _Prompt:
        context, options = request.arguments
        how: dict[str, Any] = dict(normalize_gen_kwargs(options, NEW_TOKENS))
        unknown = sorted(how.keys() - KNOWN)
        if how["do_sample"] or unknown:
            raise InputError(
                f"task {request.task_name} asks in generation_kwargs for "
                f"{', '.join(unknown) or 'do_sample'}, and continuations here are the likeliest "
                "ones; leave it out of the task's YAML"
            )
        new, end = how["max_gen_toks"], self._codec.end
        if new >= self.max_length:
            raise InputError(
                f"task {request.task_name} asks for {new} new tokens and the window is "
                f"{self.max_length}; give it fewer max_gen_toks in its YAML, or leave it out"
            )
        mark = None if end is None else self._codec.tokenizer.decode([end], False)
        until = handle_stop_sequences(how["until"], mark)
        tokens = self.tok_encode(context)[-(self.max_length - new) :]
        return _Prompt(tuple(tokens), new, tuple(until))

    def _together(self, asked: list[tuple[str, _Prompt]]) -> Iterator[list[tuple[str, _Prompt]]]:
        """Prompts, longest first, in parts that are continued together."""
        step = self._asked.batch * min(STEP_TOKENS, self.max_length)
        while asked:
            prompt = asked[0][1]
            length = power_of_two(len(prompt.tokens))
            room = prompts_together(self._source, length + prompt.new, self._asked.dtype)
            most = max(1, min(step // length, room))
            yield asked[:most]
            asked = asked[most:]

    def _continue(self, prompts: list[_Prompt]) -> list[str]:
        decode, until = self._codec.tokenizer.decode, prompts[0].until
        found = generate(
            self._source,
            [prompt.tokens for prompt in prompts],
            max_new_tokens=prompts[0].new,
            stop=tuple(self._codec.stops),
            ended=lambda new: any(word in decode(new, False) for word in until if word),
            length=power_of_two(len(prompts[0].tokens)),
            dtype=self._asked.dtype,
        )
        texts = [self._codec.decode(new) for new in found]
        return [postprocess_generated_text(text, list(until), None) for text in texts]
