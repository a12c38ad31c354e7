"""Files of chats become windows, and prompts are left out of what counts where that is asked."""

import json

import numpy as np

from pruning.stages.measure import read_tokens, text_windows
from pruning.text.calibration import calibration_batch
from pruning.text.conversation import Conversation
from pruning.text.source import TextSource
from pruning.text.tokenizer import open_codec
from tests.pruning.text.test_chat import HEADERS, TALK, as_file


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
