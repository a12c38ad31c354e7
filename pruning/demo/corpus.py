"""Corpus of the demo model: documents, split, tokenizer and token arrays.

Five domains, all free to train on and to ship excerpts of: Python standard library source and
documentation (PSF licence), PostgreSQL documentation (PostgreSQL licence), State of the Union
speeches and Moby Dick (public domain). Everything here is a pure function of the texts and a
seed, so a rebuild gives the same split, tokenizer and batches.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_jax.errors import InputError
from pruning.demo.windows import TrainingWindows, training_windows

__all__ = [
    "DOMAINS",
    "END_OF_TEXT",
    "EVALUATION_DOMAINS",
    "TrainingWindows",
    "encode_documents",
    "prepare_corpus",
    "read_documents",
    "save_tokenizer",
    "split_documents",
    "take_excerpts",
    "train_tokenizer",
    "training_windows",
]

DOMAINS = ("code", "pydocs", "pgdocs", "sotu", "mobydick")
EVALUATION_DOMAINS = {
    "code": ("code",),
    "docs": ("pydocs", "pgdocs"),
    "speech": ("sotu",),
    "novel": ("mobydick",),
}
END_OF_TEXT = "<|endoftext|>"
MODEL_MAX_LENGTH = 1024  # tokens

Documents = Mapping[str, Sequence[str]]


def read_documents(folder: str | Path) -> dict[str, list[str]]:
    """Read the documents of every domain.

    Args:
        folder: Directory with one `<domain>.jsonl.gz` per domain, one JSON string a line.

    Returns:
        Documents of each domain, in file order. A document is a source file, a documentation
        page, a speech or a chapter.

    Raises:
        InputError: If a domain's file is missing or a line is not a JSON string.
    """
    documents = {}
    for domain in DOMAINS:
        path = Path(folder) / f"{domain}.jsonl.gz"
        if not path.is_file():
            raise InputError(
                f"corpus={str(folder)!r} must hold {path.name}; "
                f"point --corpus at the folder with {', '.join(DOMAINS)}.jsonl.gz"
            )
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            documents[domain] = [json.loads(line) for line in lines]
        for number, text in enumerate(documents[domain], start=1):
            if not isinstance(text, str):
                raise InputError(
                    f"{path.name} line {number} must be a JSON string, got "
                    f"{type(text).__name__}; write one json.dumps(text) a line"
                )
    return documents


def _key(text: str, seed: int) -> bytes:
    # Whitespace is folded so that re-wrapped copies of a document count as the same document.
    return hashlib.sha256(f"{seed}\n{' '.join(text.split())}".encode()).digest()


def split_documents(
    documents: Documents, held_out: float = 0.02, seed: int = 0, minimum_bytes: int = 0
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Split by document into a training and a held-out part.

    The hash of a document's text gives its place in a queue, and each domain holds out the front
    of its queue until the quota is met, so file order does not matter. Copies of a document (up to
    whitespace, in any domain) are dropped beforehand, so none can straddle the split.

    Args:
        documents: Documents of each domain.
        held_out: Share of each domain's UTF-8 bytes to hold out, in (0, 1).
        seed: Changes which documents are held out.
        minimum_bytes: Least UTF-8 bytes to hold out of each domain, for small domains.

    Returns:
        (training, held-out) documents of each domain. Both parts of a domain are non-empty.

    Raises:
        InputError: If held_out is out of range or a domain has fewer than two distinct documents.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held_out={held_out} must lie in (0, 1); choose e.g. 0.02")
    seen: set[bytes] = set()
    training: dict[str, list[str]] = {}
    heldout: dict[str, list[str]] = {}
    for domain, texts in documents.items():
        queue = {_key(text, seed): text for text in sorted(texts, reverse=True)}
        order = sorted(key for key in queue if key not in seen)
        seen.update(order)
        if len(order) < 2:
            raise InputError(
                f"domain {domain!r} has {len(order)} distinct documents, needs at least 2 to split "
                "by document; cut the text into chapters or pages"
            )
        sizes = np.array([len(queue[key].encode()) for key in order], np.int64)
        quota = max(held_out * sizes.sum(), minimum_bytes)
        count = int(np.searchsorted(np.cumsum(sizes), quota)) + 1
        count = min(count, len(order) - 1)
        heldout[domain] = [queue[key] for key in order[:count]]
        training[domain] = [queue[key] for key in order[count:]]
    return training, heldout


def _piece(text: str, limit: int, rng: np.random.Generator) -> str:
    """A contiguous part of at most `limit` characters, cut at line or word boundaries."""
    if len(text) <= limit:
        return text.strip()
    start = int(rng.integers(0, len(text) - limit + 1))
    part = text[start : start + limit]
    for boundary in ("\n", " "):
        first = 0 if start == 0 else part.find(boundary) + 1
        last = part.rfind(boundary)
        if last - first > limit // 2:
            return part[first:last].strip()
    return part.strip()


def take_excerpts(
    texts: Sequence[str], total_bytes: int, piece: int = 4000, seed: int = 0
) -> list[str]:
    """Take one excerpt per document, of as many documents as the budget allows.

    Args:
        texts: Documents of one domain.
        total_bytes: Budget in UTF-8 bytes; reached to within one piece if the texts suffice.
        piece: Excerpt length in characters; doubled until the documents fill the budget.
        seed: Chooses documents and positions.

    Returns:
        Non-empty excerpts in a random order, in total at most `total_bytes` UTF-8 bytes.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(texts))
    longest = max((len(text) for text in texts), default=0)
    while piece < longest and sum(min(len(text), piece) for text in texts) < 1.1 * total_bytes:
        piece *= 2
    excerpts, used = [], 0
    for index in order:
        excerpt = _piece(texts[int(index)], piece, rng)
        excerpt = excerpt.encode()[: total_bytes - used].decode(errors="ignore").rstrip()
        if excerpt:
            excerpts.append(excerpt)
            used += len(excerpt.encode())
        if used >= total_bytes - 1:
            break
    return excerpts


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE tokenizer.

    All 256 bytes are in the alphabet, so any Unicode text round-trips and no unknown token exists.

    Args:
        texts: Training texts; a few MB balanced over the domains suffice.
        vocab_size: Entries including the end-of-text token (id 0) and the 256 bytes.

    Returns:
        The tokenizer, adding no special tokens on its own.

    Raises:
        InputError: If vocab_size cannot hold the alphabet or does not fit 16-bit ids.
    """
    if not 257 <= vocab_size <= 65536:
        raise InputError(f"vocab_size={vocab_size} must lie in [257, 65536]; choose e.g. 4096")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the tokenizer files that `transformers.AutoTokenizer` and `tokenizers` read.

    Args:
        tokenizer: Tokenizer with the end-of-text token.
        folder: Directory, created if missing; receives tokenizer.json, tokenizer_config.json and
            special_tokens_map.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """Encode documents into one stream, each followed by the end-of-text token.

    Args:
        tokenizer: Tokenizer with at most 65536 entries.
        documents: Texts; an end-of-text marker written inside one is encoded as plain characters.

    Returns:
        [T] uint16 token ids.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    literal = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        encodings = tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = literal
    streams = [np.array([*encoding.ids, end], np.uint16) for encoding in encodings]
    return np.concatenate(streams) if streams else np.zeros(0, np.uint16)  # [T]


def prepare_corpus(source: str | Path, folder: str | Path, seed: int = 0) -> dict[str, int]:
    """Write tokenizer, token arrays and shippable texts for the demo build.

    Args:
        source: Folder of `read_documents`.
        folder: Output: tokenizer/, train_<domain>.npy and heldout_<domain>.npy ([T] uint16),
            heldout.jsonl, calibration.jsonl (fields domain, text; training excerpts, 600 kB) and
            evaluation/{code,docs,speech,novel}.txt (held-out excerpts, 60 kB each).
        seed: Changes split and excerpts.

    Returns:
        Training tokens of each domain.
    """
    folder = Path(folder)
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    training, heldout = split_documents(read_documents(source), seed=seed, minimum_bytes=64_000)
    sample = [t for d in DOMAINS for t in take_excerpts(training[d], 1_500_000, 20_000, seed)]
    tokenizer = train_tokenizer(sample)
    save_tokenizer(tokenizer, folder / "tokenizer")
    counts = {}
    for domain in DOMAINS:
        for part, texts in (("train", training[domain]), ("heldout", heldout[domain])):
            tokens = encode_documents(tokenizer, texts)
            np.save(folder / f"{part}_{domain}.npy", tokens)
            if part == "train":
                counts[domain] = len(tokens)
    calibration = {d: take_excerpts(training[d], 120_000, seed=seed + 1) for d in DOMAINS}
    for name, texts in (("heldout", heldout), ("calibration", calibration)):
        lines = [json.dumps({"domain": d, "text": t}) + "\n" for d in DOMAINS for t in texts[d]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, domains in EVALUATION_DOMAINS.items():
        budget = 60_000 // len(domains)
        excerpts = [t for d in domains for t in take_excerpts(heldout[d], budget, 6000, seed)]
        text = "\n\n".join(excerpts) + "\n"
        (folder / "evaluation" / f"{name}.txt").write_text(text, encoding="utf-8")
    return counts
