"""Continuations and what is said of them, against torch's own and plain loops."""

import json

import numpy as np
import pytest
import torch
import transformers

import pruning
from pruning.measure.health import followed_tokens, is_right, repeated_share, sums
from pruning.text.tokenizer import open_codec
from tests.support.command import refused, run

NEW, BEGINNING = 6, 32  # tokens


def test_continuations_and_their_entropy_are_those_of_transformers(models, texts):
    found = pruning.generation_health(
        models / "single", [texts / "good.txt", texts / "short.txt"], generate=3, new_tokens=NEW,
        steps=pruning.Steps(quiet=True),
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "single").eval()
    codec = open_codec(models / "single", model.config.vocab_size)
    ids = codec.encode((texts / "good.txt").read_text())
    written, entropies = [], []
    for beginning in (ids[:BEGINNING], ids[-BEGINNING:], codec.encode("x" * BEGINNING)):
        new: list[int] = []
        for _ in range(NEW):  # the tokenizer has no token that ends a text
            with torch.no_grad():
                logits = model(torch.tensor([[*beginning, *new]])).logits[0, -1]
            logp = logits.double().log_softmax(-1)
            entropies.append(float(-(logp.exp() * logp).sum()))
            new.append(int(logp.argmax()))
        written.append(codec.decode(new))
    assert found["written"] == {"model": written}
    assert found["beginnings"][2] == "x" * BEGINNING
    health = found["health"]["model"]
    assert health["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert (health["prompts"], health["tokens"], health["truncated"]) == (3, NEW, 1)
    assert health["followed"] is None


@pytest.mark.slow
def test_a_pruned_model_stands_beside_the_dense_one(scored, texts, tmp_path, capsys):
    export, out = scored / "exports" / "ragged-bf16", tmp_path / "found.json"
    arguments = ("--generate", 3, "--new-tokens", NEW, "--json", out)
    assert run("eval", export, "--text", texts / "good.txt", *arguments) == 0
    found = json.loads(out.read_text())
    assert list(found["health"]) == list(found["written"]) == ["dense", "ragged-bf16"]
    dense, pruned = found["health"].values()
    assert dense["followed"] is None and 0 <= pruned["followed"] <= NEW
    assert pruned["entropy"] != dense["entropy"]
    shown = capsys.readouterr().out
    assert "What it writes" in shown and f"dense: {found['written']['dense'][0]!r}" in shown


def test_phrases_of_four_tokens_that_come_again_are_counted():
    assert repeated_share([[1, 2, 3, 4, 5], [7]]) == 0
    assert repeated_share([[1, 2, 1, 2, 1, 2, 1]]) == 2 / 4  # 1212 2121 1212 2121
    assert repeated_share([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0  # another continuation's
    assert repeated_share([[5] * 8, [1, 2, 3, 4, 5]]) == 4 / 7
    assert repeated_share([[]]) == 0


def test_how_long_continuations_follow_others():
    reference = [[1, 2, 3], [4, 5, 6], [7]]
    assert followed_tokens(reference, reference) == pytest.approx(7 / 3)
    assert followed_tokens([[1, 9, 3], [4, 5, 6], [7, 8]], reference) == pytest.approx(5 / 3)
    assert followed_tokens([[0], [0], []], reference) == 0


def test_sums_are_right_and_of_all_three_kinds():
    asked = sums(9)
    for text, value in asked:
        *shown, last = text.split("\n")
        assert eval(last.removesuffix("=")) == value >= 0
        assert all(eval(line.replace("=", "==")) for line in shown) and len(shown) == 3
    assert {text.split()[-3] for text, _ in asked} == {"+", "-", "*"}
    assert sums(9) == asked and sums(9, seed=1) != asked


@pytest.mark.parametrize(
    ("said", "right"),
    [(" 12", True), ("12\n13 = 4", True), ("\n12", True), (" is 12.", True), ("112", False),
     ("1\n2", False), ("", False), ("twelve", False)],
)  # fmt: skip
def test_the_first_number_of_an_answer_counts(said, right):
    assert is_right(said, 12) == right


def test_impossible_wishes_are_refused_before_any_work(models, texts, tmp_path, capsys):
    good = ("--text", texts / "good.txt")
    for words, told in (
        ((*good, "--generate", 0), "generate=0"),
        ((*good, "--generate", 2, "--evaluation-tokens", 9), "evaluation_tokens=9"),
        ((*good, "--new-tokens", 4), "add --generate N"),
        (("--generate", 2), "name one with --text"),
        (("--text", texts / "one.txt", "--generate", 2), "at least 2 are needed"),
        ((*good, "--generate", 2, "--stride", 3), "--stride: of no meaning with --generate"),
        (
            (*good, "--generate", 2, "--window", 9, "--loss-on", "answers"),
            "--window, --loss-on: of",
        ),
        ((*good, "--generate", 2, "--memory-limit", "9GB"), "--memory-limit: of no meaning"),
        ((*good, "--generate", 2, "--new-tokens", 100_000), "exceed the context"),
    ):
        assert told in refused(capsys, tmp_path, "eval", models / "single", *words)
