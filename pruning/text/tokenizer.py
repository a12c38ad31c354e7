"""The checkpoint's own tokenizer: text and conversations to tokens, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moe_jax.errors import InputError
from moe_jax.json_files import read_json
from pruning.text.chat import ChatTemplate, find_template
from pruning.text.conversation import Conversation
from pruning.text.conversion import converted

SETTINGS, CONFIG = "tokenizer_config.json", "config.json"


@dataclass(frozen=True)
class TextCodec:
    """Text to tokens and back.

    Attributes:
      tokenizer: the fast tokenizer.
      end: id of the end-of-text token, None if the checkpoint names none.
      vocab_size: rows of the embedding; a token that was added later may lie beyond them.
      first: ids that the tokenizer begins every text with, such as that of `<s>`; mostly none.
      folder: of the checkpoint, where its chat template is.
    """

    tokenizer: Tokenizer
    end: int | None
    vocab_size: int
    first: tuple[int, ...]
    folder: Path

    def encode(self, document: str | Conversation, *, special: bool = False) -> list[int]:
        """Token ids: of a text without special tokens, of a conversation with those that its chat
        template writes.

        Args:
          document: what is read.
          special: add what the tokenizer puts around every text, `first` above all.

        Raises:
          InputError: there is no chat template, or it refuses the conversation, or there is a token
            for which the model has no embedding.
        """
        text = document if isinstance(document, str) else self.template.render(document)
        found = self.tokenizer.encode(text, add_special_tokens=special)
        if max(found.ids, default=0) >= self.vocab_size:
            place = next(i for i, token in enumerate(found.ids) if token >= self.vocab_size)
            start, stop = found.offsets[place]
            raise InputError(
                f"{text[max(0, start - 20) : stop + 20]!r} in the text has the token "
                f"{found.tokens[place]!r} with id {found.ids[place]}, but the model's embedding "
                f"has {self.vocab_size} rows; take {text[start:stop]!r} out of the text"
            )
        return found.ids

    def answers(self, conversation: Conversation) -> list[bool]:
        """Which tokens of a conversation the assistant said, with the special one that ends it."""
        encoding = self.tokenizer.encode(
            self.template.render(conversation), add_special_tokens=False
        )
        said = [False] * len(encoding.ids)
        special = {i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        for start, end in self.template.answers(conversation):
            inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
            for i in inside:
                said[i] = True
            after = inside[-1] + 1 if inside else len(said)
            if after < len(said) and encoding.ids[after] in special:
                said[after] = True
        return said

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    @cached_property
    def begin(self) -> int | None:
        """Id of the token that the settings name as the beginning of a text; mostly none.

        A tokenizer may name one and not put it first, or put it first and not name it.
        """
        token = _token(self.folder, _settings(self.folder), "bos_token")
        return None if token is None else self.tokenizer.token_to_id(token)

    @cached_property
    def stops(self) -> frozenset[int]:
        """Ids at which a generated text ends: `end`, and those that the checkpoint says."""
        given = [_stored_ends(self.folder / name) for name in ("generation_config.json", CONFIG)]
        own = () if self.end is None else (self.end,)
        return frozenset(own) | {one for one in given[0] or given[1] if type(one) is int}

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
          InputError: the checkpoint has none.
        """
        found = find_template(self.folder, _settings(self.folder))
        if found is None:
            raise InputError(
                f"{self.folder} has no chat template, which conversations need; name a field of "
                "plain text with --text-field, or put the template of the model's chat version "
                f"into {self.folder}/chat_template.jinja"
            )
        return found


def open_codec(folder: Path, vocab_size: int, *, first_tokens: bool = True) -> TextCodec:
    """Open a checkpoint's tokenizer.json, or what converts to one.

    Args:
      folder: the checkpoint.
      vocab_size: rows of the embedding, which no token id may reach.
      first_tokens: whether texts begin with the tokens that the tokenizer puts first.

    Returns:
      The codec.

    Raises:
      InputError: the file is missing, unreadable, or has ids beyond the embedding that are no
        added tokens, which most texts have not.
    """
    folder = Path(folder)
    path, settings = folder / "tokenizer.json", _settings(folder)
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package raises plain Exception
            raise InputError(f"{path} is not a tokenizer: {error}; download it again") from None
    else:
        path, tokenizer = converted(folder, settings)
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{path} has token id {largest} but the model knows {vocab_size}; it is another "
            "model's tokenizer"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end = _end(folder, settings, tokenizer, vocab_size)
    first = _first(tokenizer) if first_tokens else ()
    for kind, one in [("eos_token", end), *(("the first token", one) for one in first)]:
        if one is not None and one >= vocab_size:
            raise InputError(
                f"{folder}/tokenizer_config.json: {kind} has id {one} but the model knows "
                f"{vocab_size}; name the one that the model was trained with"
            )
    return TextCodec(tokenizer, end, vocab_size, first, folder)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    return read_json(path) if path.is_file() else {}


def _first(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids before every text: what tokenizer.json says, as in transformers.

    `add_bos_token` of the settings is not read beside a tokenizer.json there, nor here.
    """
    plain, whole = (tokenizer.encode("a", add_special_tokens=on).ids for on in (False, True))
    starts = range(len(whole) - len(plain) + 1) if plain else ()
    count = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:count])


def _end(
    folder: Path, settings: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int
) -> int | None:
    given = _stored_ends(folder / CONFIG)
    if not all(type(one) is int and 0 <= one < vocab_size for one in given):
        said = str(_said_end(folder / CONFIG))[:80]
        raise InputError(
            f"{folder}/config.json: eos_token_id={said} must be ids below the vocab_size "
            f"{vocab_size}; get it again"
        )
    token = _token(folder, settings, "eos_token")
    if token is not None:
        return tokenizer.token_to_id(token)
    return next(iter(given), None)


def _token(folder: Path, settings: Mapping[str, Any], name: str) -> str | None:
    """The text of a token that the settings name."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise InputError(f"{folder / SETTINGS}: {name}={token!r} must be text; get it again")
    return token


def _said_end(path: Path) -> Any:
    return read_json(path).get("eos_token_id") if path.is_file() else None


def _stored_ends(path: Path) -> list[Any]:
    """What a config says of ids at which texts end."""
    ids = _said_end(path)
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
