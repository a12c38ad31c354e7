"""Files of chats become windows, and prompts are left out of what counts where that is asked."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from moe_jax.errors import InputError
from pruning.stages.measure import read_tokens, text_windows
from pruning.text.calibration import calibration_batch
from pruning.text.conversation import Conversation
from pruning.text.source import TextSource
from pruning.text.tokenizer import open_codec
from tests.pruning.text.test_chat import HEADERS, TALK, as_file
from tests.support.tiny import add_tokenizer


def test_answers_alone_count_in_windows_of_chats(tmp_path):
    as_file(tmp_path, HEADERS)
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 3)
    codec, source = open_codec(tmp_path, 300), TextSource(tmp_path / "chat.jsonl")
    talk = codec.encode(Conversation(TALK))
    stream = [*[*talk, codec.end] * 2, *talk]
    said = [*[*codec.answers(Conversation(TALK)), False] * 2, *codec.answers(Conversation(TALK))]
    assert 0 < sum(said) < len(said)
    how = {"length": 32, "max_tokens": 1000, "separator": codec.end}
    batch = calibration_batch([source], codec.encode, answers=codec.answers, **how)
    assert batch.tokens[batch.valid].tolist() == stream
    assert batch.counted[batch.valid].tolist() == said and not batch.counted[~batch.valid].any()
    assert batch.sources[0]["loss_on"] == "answers"
    whole = calibration_batch([source], codec.encode, **how)
    assert whole.counted is None and np.array_equal(whole.tokens, batch.tokens)
    windows = text_windows(read_tokens(source, codec, 1000, "answers"), codec, 32)
    assert windows.scored.sum() == sum(said)
    assert set(windows.tokens[:, 1:][windows.scored]) == {
        t for t, s in zip(stream, said, strict=True) if s
    }


def beyond(folder: Path) -> Path:
    """A chat model with 256 rows whose tokenizer got [PAD] and <s> afterwards, ids 256 and 257."""
    add_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]", "<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_token_without_an_embedding_is_refused_inside_a_conversation_too(tmp_path):
    codec = open_codec(beyond(tmp_path), 256)
    talk = [{"role": "user", "content": "Pad it"}, {"role": "assistant", "content": "[PAD] so"}]
    with pytest.raises(InputError, match=r"has the token '\[PAD\]' with id 256, but the model's "
                       r"embedding has 256 rows; take '\[PAD\]' out of the text"):  # fmt: skip
        codec.encode(Conversation(talk))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    with pytest.raises(InputError, match="id 256"):
        read_tokens(TextSource(tmp_path / "chat.jsonl"), codec, 1000, "answers")
    talk[1]["content"] = "so"  # as advised
    assert codec.encode(Conversation(talk)) == codec.encode("Pad itso")


def test_a_first_token_without_an_embedding_is_refused_unless_none_is_put(tmp_path):
    tokenizer = Tokenizer.from_file(str(beyond(tmp_path) / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 257)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="the first token has id 257 but the model knows 256"):
        open_codec(tmp_path, 256)
    assert open_codec(tmp_path, 258).first == (257,)
    assert open_codec(tmp_path, 256, first_tokens=False).first == ()
