"""Verification compares logits on windows that show a sliding window and a stretched rope."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from convert import open_checkpoint
from convert.export_format import ExportFormat
from moe_jax.attention import rope as rope_module
from moe_jax.config import RopeConfig
from pruning import apply_plan
from pruning.budget.plan import PruningPlan
from pruning.kit.errors import VerificationError
from pruning.measure.settled import settled_logits
from pruning.stages import client
from pruning.stages.checks import MOST, Check, long_check
from pruning.stages.client import client_bytes
from pruning.stages.probe_windows import (
    LONG_WINDOWS,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    probe_shapes,
    random_probe,
    text_probe,
)
from pruning.stages.sizes import export_of
from pruning.text.calibration import TokenBatch
from tests.support import tiny

YARN = {"kind": "yarn", "factor": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "model"
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {"sliding_window": 128, "max_position_embeddings": 512, "rope_parameters": rope}
    return tiny.save(tiny.tiny_model("gpt_oss", **sizes), folder)


SHORT = (PROBE_WINDOWS, PROBE_TOKENS, 1)


@pytest.mark.parametrize(
    ("window", "rope", "context", "more"),
    [
        (None, {}, 512, []),
        (128, {}, 512, [(LONG_WINDOWS, 160, 1)]),
        (128, {}, 140, [(LONG_WINDOWS, 140, 1)]),  # the model's own limit
        (8, {}, 32, []),  # the short ones show it
        (8, {}, 33, [(LONG_WINDOWS, 33, 1)]),
        (512, {}, 512, []),  # a window as long as the context hides nothing
        (4096, {}, 131072, [(LONG_WINDOWS, 4128, 1)]),  # Mixtral's
        (32768, {}, 131072, [(LONG_WINDOWS, 32800, 1)]),
        # A rope turns by positions: 31 steps of 4 reach beyond 96, of 133 beyond 4,096.
        (None, {**YARN, "original_max_position": 96}, 512, [(8, 32, 4)]),
        (None, {**YARN, "original_max_position": 16}, 512, []),  # the short ones do
        (None, {**YARN, "original_max_position": 500}, 512, [(8, 32, 16)]),  # 31 * 16 < 512 - 1
        (128, {**YARN, "original_max_position": 4096}, 131072,
         [(8, 32, 133), (LONG_WINDOWS, 160, 1)]),  # gpt-oss'
        (None, {**YARN, "original_max_position": 32768}, 131072, [(8, 32, 1058)]),
        (None, {**YARN, "original_max_position": 262144}, 1048576, [(8, 32, 1058)]),  # float32 ends
        (None, YARN, 512, [(8, 32, 16)]),  # stretched from the whole context
        (None, YARN, 131072, [(8, 32, 1058)]),
        (None, {"kind": "linear", "factor": 4.0, "original_max_position": 96}, 512, []),
        (None, {**YARN, "kind": "llama3", "original_max_position": 96}, 512, [(8, 32, 4)]),
    ],
)  # fmt: skip
def test_windows_reach_as_far_as_what_they_must_show(folder, window, rope, context, more):
    config = open_checkpoint(folder).config
    attention = dataclasses.replace(config.attention, rope=RopeConfig(theta=1e4, **rope))
    changed = config.replace(
        attention=attention, sliding_window=window, max_position=context,
        sliding_layers=config.sliding_layers if window else (),
    )  # fmt: skip
    assert list(probe_shapes(changed)) == [SHORT, *more]
    for _, length, stride in more:
        reached = (length - 1) * stride
        assert reached < context
        if stride > 1:
            original = rope.get("original_max_position") or context
            assert reached >= min(original, context - PROBE_TOKENS, 32768)


def test_a_context_of_few_tokens_is_never_left(folder):
    config = open_checkpoint(folder).config
    attention = dataclasses.replace(
        config.attention, rope=RopeConfig(theta=1e4, **YARN, original_max_position=16)
    )
    for context in (1, 16):
        short = config.replace(
            attention=attention, max_position=context, sliding_window=None, sliding_layers=()
        )
        assert list(probe_shapes(short)) == [(PROBE_WINDOWS, context, 1)]


def of(folder, **changes):
    """A copy of a folder whose config.json says something else."""
    other = shutil.copytree(folder, folder.with_name("other"), dirs_exist_ok=True)
    said = json.loads((other / "config.json").read_text()) | changes
    (other / "config.json").write_text(json.dumps(said))
    return other


def test_a_model_with_another_sliding_window_differs_on_the_long_windows_alone(folder):
    short, far = random_probe(open_checkpoint(folder))
    assert (short.shape, far.shape) == (SHORT, (LONG_WINDOWS, 160, 1))
    (same, wanted), (same_too, found) = (
        [
            logits
            for logits, _ in settled_logits(
                open_checkpoint(some), [short.tokens, far.tokens], PROBE_TOKENS
            )
        ]
        for some in (folder, of(folder, sliding_window=140))
    )
    np.testing.assert_allclose(same, same_too, atol=1e-5)
    assert np.abs(found[:, 12:] - wanted[:, 12:]).max() > 1e-2
    assert long_check("e", "c", wanted, wanted).ok and not long_check("e", "c", found, wanted).ok


@pytest.fixture(scope="module")
def stretched(tmp_path_factory):
    """A model whose rope was stretched by hand, as cards of Qwen models tell it."""
    folder = tmp_path_factory.mktemp("stretched") / "model"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    sizes = {"max_position_embeddings": 131072, "rope_parameters": yarn | {"rope_theta": 1e6}}
    return tiny.save(tiny.tiny_model("qwen3_moe", **sizes), folder)


def half_of(base) -> PruningPlan:
    """A plan that keeps as many channels of every expert."""
    moe, layers = base.config.moe, base.config.moe_layers
    rank = np.random.default_rng(3).random((len(layers), moe.num_experts, moe.d_expert))
    keep = rank.argsort(axis=-1) < moe.d_expert // 2
    return PruningPlan(keep, layers, {"model_hash": base.fingerprint})


def written(folder, out) -> list[Check]:
    """What `apply` finds of a folder of which half the channels are cut out."""
    out.mkdir()
    half_of(open_checkpoint(folder)).save(out)
    return apply_plan(out, str(folder), out.with_name("out"), export=["padded-bf16"])


@pytest.mark.slow
def test_a_rope_stretched_at_32768_positions_is_compared_there(stretched, tmp_path, monkeypatch):
    checks = written(stretched, tmp_path / "plan")
    apart = [check for check in checks if "far apart" in check.check]
    assert [check.check for check in apart] == [
        "logits in JAX at positions far apart",
        "logits in transformers at positions far apart",
    ]
    assert all(check.ok and check.done for check in checks)
    right = rope_module._yarn

    def unstretched(*given):  # the slowest pair, which 32 tokens turn by 2e-4
        frequencies, scale = right(*given)
        return np.append(frequencies[:-1], 4 * frequencies[-1]), scale

    with monkeypatch.context() as patch, pytest.raises(VerificationError) as error:
        patch.setattr(rope_module, "_yarn", unstretched)
        jax.clear_caches()
        written(stretched, tmp_path / "again")
    jax.clear_caches()
    assert "logits in transformers at positions far apart" in str(error.value)
    assert "logits in transformers:" not in str(error.value)


@pytest.mark.parametrize("wrong", [16, 17])
def test_three_quarters_of_the_ends_of_long_windows_must_be_the_same(wrong):
    wanted = np.zeros((LONG_WINDOWS, PROBE_TOKENS, 3), np.float32)
    found = wanted.copy()
    found.reshape(-1, 3)[:wrong, 1] = 0.5
    check = long_check("e", "c", found, wanted)
    assert MOST == 0.75 and check.ok == (wrong == 16) and check.check == "c"
    assert check.detail == f"{64 - wrong} of 64 positions differ by no more than 0.002"
    assert not long_check("e", "c", np.full_like(wanted, np.nan), wanted).ok


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_a_text_is_one_document_where_its_windows_are_shorter_than_a_sliding_one(folder, windows):
    base = open_checkpoint(folder)
    tokens = np.arange(windows * 100, dtype=np.int32).reshape(windows, 100) % 300
    valid = np.ones(tokens.shape, bool)
    valid[-1, 90:] = False
    probe = text_probe(base, TokenBatch(tokens, valid))
    assert [some.shape for some in probe] == [(windows, 32, 1), (2, 160, 1)]
    short, far = (some.tokens for some in probe)
    np.testing.assert_array_equal(short[0], tokens[0, :32])
    assert short.shape == (windows, 32) and far.shape == (2, 160)
    text = np.arange(windows * 100 - 10) % 300
    if windows == 1:  # too short
        np.testing.assert_array_equal(far, random_probe(base)[1].tokens)
    else:
        np.testing.assert_array_equal(far, [text[:160], text[-160:]])


def test_of_a_text_the_same_windows_are_read_beside_each_other_and_far_apart(stretched):
    text = TokenBatch(np.arange(100, dtype=np.int32).reshape(2, 50), np.ones((2, 50), bool))
    near, apart = text_probe(open_checkpoint(stretched), text)
    assert (near.stride, apart.stride) == (1, 1058)
    np.testing.assert_array_equal(near.tokens, apart.tokens)
    np.testing.assert_array_equal(near.tokens, text.tokens[:, :32])


def test_where_long_windows_do_not_fit_in_memory_transformers_is_asked_about_the_others(
    folder, tmp_path, monkeypatch
):
    base = open_checkpoint(folder)
    export = export_of(base.about, half_of(base), ExportFormat("padded-bf16"))
    shapes = [some.shape for some in random_probe(base)]
    free = client_bytes(export, shapes) - 1
    assert client_bytes(export, shapes[:1]) < free
    monkeypatch.setattr(client, "free_memory", lambda: free)
    asked = {check.check: check for check in written(folder, tmp_path / "plan")}
    assert asked["logits in transformers"].done
    long = asked["logits in transformers at the ends of long windows"]
    assert long.ok and not long.done and long.detail.startswith("not done: it needs about")
