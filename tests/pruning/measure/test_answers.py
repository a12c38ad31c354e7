"""Ends of texts under a model, beside the whole model called on each of them by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.transformer import init
from pruning.measure import answers
from pruning.measure.answers import Question, answer
from tests.pruning.scores.test_layer import CONFIG

forward = jax.jit(lambda model, tokens, valid: model(tokens, valid))


def logits(model, tokens) -> np.ndarray:
    """float64 [T, V]; padded to one length, which is one compilation."""
    padded = np.zeros((1, CONFIG.max_position), np.int32)
    padded[0, : len(tokens)] = tokens
    valid = (np.arange(CONFIG.max_position) < len(tokens))[None]
    found = forward(model, jnp.asarray(padded), jnp.asarray(valid))
    return np.asarray(found, np.float64)[0, : len(tokens)]


@pytest.fixture(scope="module")
def model():
    model = init(CONFIG, jax.random.key(5))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim == 2 else leaf, model)


def questions() -> list[Question]:
    """Texts of every length that CONFIG allows and some twice; some begin others."""
    draw = np.random.default_rng(3)
    found = []
    for length in [2, 3, 5, 9, 16, 17, 18, 30, 33, 9, 12]:
        tokens = tuple(draw.integers(0, CONFIG.vocab_size, length).tolist())
        found.append(Question(tokens, int(draw.integers(1, length))))
    whole = found[7].tokens
    found += [Question(whole[:-1], 3), Question((*whole[:20], 1), 1), Question((*whole[:20], 2), 2)]
    return [*found, found[3]]


def by_hand(model, question: Question) -> tuple[float, bool]:
    scores = logits(model, question.tokens[:-1])
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    places = range(len(question.tokens) - 1 - question.scored, len(question.tokens) - 1)
    total = sum(logp[place, question.tokens[place + 1]] for place in places)
    return total, all(scores[place].argmax() == question.tokens[place + 1] for place in places)


class Counting:
    """A model that says how often a layer of it is read."""

    def __init__(self, model):
        self.model, self.read = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __len__(self):
        return len(self.model)

    def layer(self, index):
        self.read.append(index)
        return self.model.layer(index)


@pytest.mark.parametrize(("held", "passes"), [(1 << 40, 1), (40, 7), (1, 11)])
def test_answers_are_those_of_the_whole_model_in_any_number_of_passes(
    model, monkeypatch, held, passes
):
    monkeypatch.setattr(answers, "PASS_BYTES", held * CONFIG.d_model * 4)
    asked, found, steps, source = questions(), {}, [], Counting(model)
    for some in answer(source, asked, batch=1, on_step=lambda *step: steps.append(step)):
        assert not found.keys() & some.keys()
        found |= some
    assert source.read == list(range(len(model))) * passes
    assert sorted(found) == list(range(len(asked)))
    expected = [by_hand(model, one) for one in asked]
    for place, (total, likeliest) in enumerate(expected):
        assert found[place] == (pytest.approx(total, rel=1e-5), likeliest)
    done = [one for one, _ in steps]
    assert done == sorted(done) and steps[-1][0] == steps[-1][1]


def test_whether_an_end_is_the_likeliest_is_said_of_all_of_its_tokens(model):
    text = [7, 40]
    for _ in range(4):
        text.append(int(logits(model, text)[-1].argmax()))
    other = [*text[:3], (text[3] + 1) % CONFIG.vocab_size, *text[4:]]
    (found,) = answer(model, [Question(tuple(text), 4), Question(tuple(other), 4)])
    assert found[0][1] and not found[1][1]


def test_texts_that_others_begin_with_are_run_in_them(model):
    ran = []

    class Watched(Counting):
        @property
        def embedding(self):
            return lambda tokens, dtype: ran.append(tokens) or self.model.embedding(tokens, dtype)

    whole = tuple(range(1, 13))
    asked = [Question((*whole, last), 1) for last in (5, 6, 7)] + [Question(whole[:5], 2)]
    list(answer(Watched(model), asked))
    (tokens,) = ran
    assert tokens.shape == (1, 16) and tokens[0, :12].tolist() == list(whole)


def test_a_broken_model_is_said(model):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.ndim == 2 else leaf, model)
    with pytest.raises(InputError, match="is not finite; the model's weights are broken"):
        list(answer(broken, [Question((1, 2, 3), 1)]))
