"""Verification compares logits on windows that show a sliding window and a stretched rope."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest

from convert import open_checkpoint
from moe_jax.config import RopeConfig
from pruning.stages.verify import LONGEST_PROBE, PROBE_TOKENS, probe_lengths, random_probe
from tests.support import tiny
from tests.support.logits import logits

YARN = {"kind": "yarn", "factor": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "model"
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {"sliding_window": 128, "max_position_embeddings": 512, "rope_parameters": rope}
    return tiny.save(tiny.tiny_model("gpt_oss", **sizes), folder)


@pytest.mark.parametrize(
    ("window", "rope", "context", "lengths"),
    [
        (None, {}, 512, (PROBE_TOKENS, PROBE_TOKENS)),
        (None, {}, 16, (16, 16)),
        (128, {}, 512, (128 + PROBE_TOKENS,) * 2),
        (None, {**YARN, "original_max_position": 96}, 512, (96 + PROBE_TOKENS,) * 2),
        (128, {**YARN, "original_max_position": 256}, 512, (256 + PROBE_TOKENS,) * 2),
        (128, {}, 140, (140, 140)),  # the model's own limit
        (4096, {}, 131072, (LONGEST_PROBE, 4096 + PROBE_TOKENS)),
    ],
)
def test_a_window_is_as_long_as_what_it_must_show(folder, window, rope, context, lengths):
    config = open_checkpoint(folder).config
    attention = dataclasses.replace(config.attention, rope=RopeConfig(theta=1e4, **rope))
    changed = config.replace(
        attention=attention, sliding_window=window, max_position=context,
        sliding_layers=config.sliding_layers if window else (),
    )  # fmt: skip
    assert probe_lengths(changed) == lengths


def test_the_vocabulary_of_gpt_oss_leaves_room_beyond_its_window_a_larger_one_does_not(folder):
    config = open_checkpoint(folder).config.replace(max_position=131072)
    assert probe_lengths(config.replace(vocab_size=201088)) == (160, 160)
    assert probe_lengths(config.replace(vocab_size=1 << 20)) == (PROBE_TOKENS, 160)


def test_a_model_with_another_sliding_window_differs_on_the_probe(folder, tmp_path, caplog):
    other = shutil.copytree(folder, tmp_path / "other")
    said = json.loads((other / "config.json").read_text()) | {"sliding_window": 140}
    (other / "config.json").write_text(json.dumps(said))
    base = open_checkpoint(folder)
    probe = random_probe(base)
    assert probe.shape == (2, 160) and not caplog.records
    found, wanted = (logits(open_checkpoint(f), probe) for f in (other, folder))
    np.testing.assert_allclose(found[:, :128], wanted[:, :128], atol=1e-5)
    assert np.abs(found[:, 140:] - wanted[:, 140:]).max() > 1e-2


def test_what_is_too_long_to_be_compared_is_said(folder, tmp_path, caplog):
    other = shutil.copytree(folder, tmp_path / "other")
    said = {"sliding_window": 4096, "max_position_embeddings": 131072}
    said = json.loads((other / "config.json").read_text()) | said
    (other / "config.json").write_text(json.dumps(said))
    with caplog.at_level(logging.WARNING):
        assert random_probe(open_checkpoint(other)).shape == (2, LONGEST_PROBE)
    assert "compared on 1024 tokens, what the model does with more than 4096 is not" in caplog.text
