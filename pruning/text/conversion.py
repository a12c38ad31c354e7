"""Tokenizers of before tokenizer.json: byte ranks of tiktoken, and sentencepiece models."""

import base64
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from moe_jax.errors import InputError

TIKTOKEN, SENTENCEPIECE = "tiktoken.model", "tokenizer.model"
# A file of ranks does not say how text is cut before it is merged: a Python file beside it does,
# which is read here and never run. The alternatives of each known pattern, all of which must stand
# in that file.
MOONSHOT = (
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
PATTERNS = (MOONSHOT,)  # of Kimi and Moonlight


def converted(folder: Path, settings: Mapping[str, Any]) -> tuple[Path, Tokenizer]:
    """The tokenizer of a folder without tokenizer.json.

    Args:
      folder: the checkpoint.
      settings: its tokenizer_config.json.

    Returns:
      (file that it was made from, the tokenizer, which gives the ids of the original).

    Raises:
      InputError: there is none, or none that can be converted; with what to do.
    """
    if (path := folder / TIKTOKEN).is_file():
        return path, _from_ranks(path, settings)
    if (path := folder / SENTENCEPIECE).is_file():
        return path, _from_sentencepiece(path)
    raise InputError(
        f"{folder / 'tokenizer.json'} does not exist; copy the model's tokenizer.json there, or "
        f"its {TIKTOKEN} or {SENTENCEPIECE}, which are converted"
    )


def _from_ranks(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    pattern = _pattern(path.parent, settings)
    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
    except ValueError as error:
        raise InputError(f"{path} holds no ranks of bytes: {error}; download it again") from None
    letters = _letters()
    name = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = sorted(
        (rank, ranks[piece[:cut]], name[piece[:cut]], name[piece[cut:]])
        for piece, rank in ranks.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    )
    vocabulary = {name[piece]: rank for piece, rank in ranks.items()}
    pairs = [(left, right) for _, _, left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(pattern)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Special tokens follow the ranks; those without a name count as reserved ones.
    known = _special_tokens(path.parent, settings)
    ids = range(len(ranks), 1 + max(known, default=-1))
    spelled = [known.get(i, f"<|reserved_token_{i}|>") for i in ids]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in spelled])
    return tokenizer


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    added = settings.get("added_tokens_decoder") or {}
    try:
        return {int(number): str(token["content"]) for number, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{folder}/tokenizer_config.json: added_tokens_decoder={str(added)[:80]} must be "
            "tokens by their ids; get it again"
        ) from None


def _letters() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary.

    Printable ones stand for themselves, the others for those from 256 on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = (chr(code) for code in range(256, 512))
    return {byte: chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)}


def _pattern(folder: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    given = settings.get("auto_map")
    named = given.get("AutoTokenizer") if isinstance(given, dict) else None
    named = named[0] if isinstance(named, list) and named else named
    code = folder / f"{str(named).partition('.')[0]}.py"
    text = code.read_text(encoding="utf-8") if code.is_file() else ""
    for pattern in PATTERNS:
        if text and all(piece in text for piece in pattern):
            return pattern
    raise InputError(
        f"{folder / TIKTOKEN} does not say how text is cut, and {code.name}, which does, holds no "
        "pattern that is known here; put a tokenizer.json of the model there, or write it with the "
        "pattern of that file: python -c 'from transformers.convert_slow_tokenizer import "
        f'TikTokenConverter; TikTokenConverter("{folder / TIKTOKEN}", pattern=r"PATTERN", '
        f'extra_special_tokens=["NAMES"]).converted().save("{folder}/tokenizer.json")\''
    )


def _from_sentencepiece(path: Path) -> Tokenizer:
    try:
        for package in ("sentencepiece", "google.protobuf"):
            importlib.import_module(package)
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(
            f"{path} is a sentencepiece model, which needs more packages to be read ({error}): "
            "pip install 'moe-jax[sentencepiece]'"
        ) from None
    try:
        found = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)
        return Tokenizer.from_str(found.backend_tokenizer.to_str())
    except Exception as error:  # of many kinds, and of two packages
        cause = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{path} cannot be converted: {cause[:300]}; put a tokenizer.json of the model there"
        ) from None
