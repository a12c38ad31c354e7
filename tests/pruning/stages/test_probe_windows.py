"""Verification compares logits on windows that show a sliding window and a stretched rope."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest

from convert import open_checkpoint
from moe_jax.config import RopeConfig
from pruning.measure.settled import settled_logits
from pruning.stages.probe_windows import (
    FAR_WINDOWS,
    LONGEST_PROBE,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    far_lengths,
    random_probe,
    text_probe,
)
from pruning.stages.verify import MOST, far_check
from pruning.text.calibration import TokenBatch
from tests.support import tiny

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
        (4096, {}, 131072, (4096 + PROBE_TOKENS,) * 2),  # Mixtral's
        (
            128,
            {**YARN, "original_max_position": 4096},
            131072,
            (4096 + PROBE_TOKENS,) * 2,
        ),  # gpt-oss'
        (
            None,
            {**YARN, "original_max_position": 32768},
            131072,
            (LONGEST_PROBE, 32768 + PROBE_TOKENS),
        ),
    ],
)
def test_a_window_is_as_long_as_what_it_must_show(folder, window, rope, context, lengths):
    config = open_checkpoint(folder).config
    attention = dataclasses.replace(config.attention, rope=RopeConfig(theta=1e4, **rope))
    changed = config.replace(
        attention=attention, sliding_window=window, max_position=context,
        sliding_layers=config.sliding_layers if window else (),
    )  # fmt: skip
    assert far_lengths(changed) == lengths


def test_a_model_with_another_sliding_window_differs_on_the_long_windows_alone(
    folder, tmp_path, caplog
):
    other = shutil.copytree(folder, tmp_path / "other")
    said = json.loads((other / "config.json").read_text()) | {"sliding_window": 140}
    (other / "config.json").write_text(json.dumps(said))
    base = open_checkpoint(folder)
    short, far = probe = random_probe(base)
    assert short.shape == (PROBE_WINDOWS, PROBE_TOKENS) and not caplog.records
    assert far.shape == (FAR_WINDOWS, 160)
    (same, wanted), (same_too, found) = (
        [logits for logits, _ in settled_logits(open_checkpoint(f), probe, PROBE_TOKENS)]
        for f in (folder, other)
    )
    np.testing.assert_allclose(same, same_too, atol=1e-5)
    assert np.abs(found[:, 12:] - wanted[:, 12:]).max() > 1e-2
    assert far_check("e", wanted, wanted).ok and not far_check("e", found, wanted).ok


@pytest.mark.parametrize("wrong", [16, 17])
def test_three_quarters_of_the_ends_of_long_windows_must_be_the_same(wrong):
    wanted = np.zeros((FAR_WINDOWS, PROBE_TOKENS, 3), np.float32)
    found = wanted.copy()
    found.reshape(-1, 3)[:wrong, 1] = 0.5
    check = far_check("e", found, wanted)
    assert MOST == 0.75 and check.ok == (wrong == 16)
    assert check.detail == f"{64 - wrong} of 64 positions differ by no more than 0.002"
    assert not far_check("e", np.full_like(wanted, np.nan), wanted).ok


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_a_text_is_one_document_where_its_windows_are_shorter_than_a_sliding_one(folder, windows):
    base = open_checkpoint(folder)
    tokens = np.arange(windows * 100, dtype=np.int32).reshape(windows, 100) % 300
    valid = np.ones(tokens.shape, bool)
    valid[-1, 90:] = False
    short, far = text_probe(base, TokenBatch(tokens, valid))
    np.testing.assert_array_equal(short[0], tokens[0, :32])
    assert short.shape == (windows, 32) and far.shape == (2, 160)
    text = np.arange(windows * 100 - 10) % 300
    if windows == 1:  # too short
        np.testing.assert_array_equal(far, random_probe(base)[1])
    else:
        np.testing.assert_array_equal(far, [text[:160], text[-160:]])


def test_what_is_too_long_to_be_compared_is_said(folder, tmp_path, caplog):
    other = shutil.copytree(folder, tmp_path / "other")
    said = {"sliding_window": 8192, "max_position_embeddings": 131072}
    said = json.loads((other / "config.json").read_text()) | said
    (other / "config.json").write_text(json.dumps(said))
    with caplog.at_level(logging.WARNING):
        assert random_probe(open_checkpoint(other))[1].shape == (2, LONGEST_PROBE)
    assert "compared on 4128 tokens, what the model does with more than 8192 is not" in caplog.text
