"""The checkpoint's own tokenizer, read without transformers."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from moe_jax.errors import InputError
from moe_jax.json_files import read_json


@dataclass(frozen=True)
class TextCodec:
    """Text to tokens and back.

    Attributes:
      tokenizer: the fast tokenizer.
      end: id of the end-of-text token, None if the checkpoint names none.
      vocab_size: rows of the embedding; a token that was added later may lie beyond them.
    """

    tokenizer: Tokenizer
    end: int | None
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens.

        Raises:
          InputError: the text holds a token for which the model has no embedding.
        """
        found = self.tokenizer.encode(text, add_special_tokens=False)
        if max(found.ids, default=0) >= self.vocab_size:
            place = next(i for i, token in enumerate(found.ids) if token >= self.vocab_size)
            start, stop = found.offsets[place]
            raise InputError(
                f"{text[max(0, start - 20) : stop + 20]!r} in the text has the token "
                f"{found.tokens[place]!r} with id {found.ids[place]}, but the model's embedding "
                f"has {self.vocab_size} rows; take {text[start:stop]!r} out of the text"
            )
        return found.ids

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def open_codec(folder: Path, vocab_size: int) -> TextCodec:
    """Open a checkpoint's tokenizer.json.

    Args:
      folder: the checkpoint.
      vocab_size: rows of the embedding, which no token id may reach.

    Returns:
      The codec.

    Raises:
      InputError: the file is missing, unreadable, or has ids beyond the embedding that are no
        added tokens, which most texts have not.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; copy the model's tokenizer.json there (a slow tokenizer "
            "converts with transformers' AutoTokenizer and save_pretrained)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise InputError(f"{path} is not a tokenizer: {error}; download it again") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{path} has token id {largest} but the model knows {vocab_size}; it is another "
            "model's tokenizer"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end = _end(Path(folder), tokenizer, vocab_size)
    if end is not None and end >= vocab_size:
        raise InputError(
            f"{folder}/tokenizer_config.json: eos_token has id {end} but the model knows "
            f"{vocab_size}; name the one that the model was trained with"
        )
    return TextCodec(tokenizer, end, vocab_size)


def _end(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> int | None:
    ids = read_json(folder / "config.json").get("eos_token_id")
    given = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(one) is int and 0 <= one < vocab_size for one in given):
        raise InputError(
            f"{folder}/config.json: eos_token_id={str(ids)[:80]} must be ids below the "
            f"vocab_size {vocab_size}; get it again"
        )
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        token = read_json(settings).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise InputError(f"{settings}: eos_token={token!r} must be text; get it again")
        if token is not None:
            return tokenizer.token_to_id(token)
    return next(iter(given), None)
