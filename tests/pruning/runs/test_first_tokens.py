"""The token that a tokenizer puts first begins texts and windows, as other programs have it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors

import pruning
from convert import open_checkpoint
from pruning.kit.progress import Steps
from pruning.stages.job import open_job
from tests.support import tiny

QUIET = Steps(quiet=True)
TEXT = (
    " = Robert <unk> = \n\n Robert is an English film , television and theatre actor . " * 9
    + "The end"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mixtral whose tokenizer begins every text with <s>, and a text beside it."""
    folder = tmp_path_factory.mktemp("first") / "model"
    model = tiny.tiny_model("mixtral", vocab_size=260, intermediate_size=32)
    tiny.add_tokenizer(tiny.save(model, folder))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def rolling_log_likelihood(model, tokens: list[int], prefix: int, most: int) -> float:
    """Of a text, by the rule of lm-evaluation-harness (context_len 1), a window at a time.

    The first window has the prefix for context and predicts up to `most` tokens. Each later one
    predicts as many again, or what is left, from the `most` tokens that end before its last.
    """
    total, predicted = 0.0, 0
    while predicted < len(tokens):
        count = min(most, len(tokens) - predicted)
        end = predicted + count
        given = [prefix, *tokens][max(0, end - most) : end]
        with torch.no_grad():
            scores = model(torch.tensor([given])).logits[0].double().log_softmax(-1)
        wanted = torch.tensor(tokens[predicted:end])
        total += scores[-count:].gather(1, wanted[:, None]).sum().item()
        predicted = end
    return total


@pytest.mark.parametrize("most", [16, 47, 63])
def test_perplexity_is_that_of_a_rolling_log_likelihood(folder, most):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) % most  # else the last window would show nothing
    total = rolling_log_likelihood(model, tokens, tokenizer.bos_token_id, most)
    (found,) = pruning.evaluate(
        folder, [folder.parent / "text.txt"], window=most + 1, stride=most, steps=QUIET
    )["texts"].values()
    assert found["tokens"] == len(tokens)
    assert found["nll"] == pytest.approx(-total / len(tokens), rel=1e-5)


def test_without_first_tokens_the_text_alone_is_measured(folder):
    text = folder.parent / "text.txt"
    with_first, without = (
        pruning.evaluate(folder, [text], first_tokens=on, steps=QUIET)["texts"][str(text)]
        for on in (True, False)
    )
    assert with_first["tokens"] == without["tokens"] + 1 == len(TEXT.encode())
    assert with_first["nll"] != without["nll"]


def opened(folder, **options):
    text = str(folder.parent / "text.txt")
    return open_job(
        pruning.CompressionRecipe(
            model=str(folder), output=str(folder.parent / "out"), calibration=(text,),
            evaluation=(text,), window=50, bits=16, export=("padded-bf16",), planner="fair",
            **options,
        )
    )  # fmt: skip


def test_every_text_and_calibration_window_begins_with_it(folder):
    job, plain = opened(folder, max_tokens=175), opened(folder, first_tokens=False, max_tokens=175)
    tokens = job.calibration.tokens
    assert (tokens[:, 0] == 256).all() and (tokens[:, 1:] != 256).all()
    assert job.calibration.total == 175
    said = job.codec.decode(tokens[job.calibration.valid].tolist())
    assert said == TEXT[: 175 - len(tokens)]
    assert not (plain.calibration.tokens == 256).any()
    (windows,), (others,) = (j.evaluation.values() for j in (job, plain))
    assert np.flatnonzero(windows.tokens[:, 0] == 256).tolist() == [0]
    assert not (others.tokens == 256).any()
    assert job.calibration.sources[0]["first"] == [256]
    assert "first" not in plain.calibration.sources[0]


def test_a_choice_of_first_tokens_is_another_run(folder, tmp_path):
    shared = {"rates": [0.5], "rules": ["uniform-energy"], "steps": QUIET}
    text = str(folder.parent / "text.txt")

    def recipe(**options):
        return pruning.CompressionRecipe(
            model=str(folder), output=str(tmp_path / "out"), calibration=(text,), window=32,
            evaluation=(text,), max_tokens=256, block=8, evaluation_tokens=40, **options,
        )  # fmt: skip

    pruning.compare(recipe(), **shared)
    with pytest.raises(pruning.InputError, match=r"results of another .*first"):
        pruning.compare(recipe(first_tokens=False), **shared)


def test_a_window_longer_than_the_context_is_refused(folder):
    assert open_checkpoint(folder).config.max_position == 64
    text = [folder.parent / "text.txt"]
    with pytest.raises(pruning.InputError, match=r"window=65 .* context of 64 tokens; .*window 64"):
        pruning.evaluate(folder, text, window=65, steps=QUIET)
    recipe = pruning.CompressionRecipe(model="m", output="o", window=65)
    with pytest.raises(pruning.InputError, match=r"window=65 .* context of 64 tokens"):
        recipe.resolved(32, 32, 64)
    assert recipe.resolved(32, 32, 65).window == 65


def test_windows_beyond_the_trained_context_are_said(tmp_path, capsys):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
            "rope_theta": 10000.0}  # fmt: skip
    sizes = {"vocab_size": 260, "rope_parameters": rope}
    folder = tiny.add_tokenizer(tiny.save(tiny.tiny_model("qwen3_moe", **sizes), tmp_path / "m"))
    text = Path(tmp_path, "text.txt")
    text.write_text(TEXT)
    for window, is_said in ((17, True), (16, False)):
        capsys.readouterr()
        pruning.evaluate(folder, [text], window=window, evaluation_tokens=30)
        assert ("longer than the 16 that" in capsys.readouterr().err) == is_said
