"""The losses of recovery, by hand and against finite differences of plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from pruning.recovery.loss import next_token_loss, predicted, prediction_losses


def test_positions_count_where_their_token_and_the_next_are_real_and_the_next_is_asked_for():
    # Five tokens: the prompt 0 1, the answer 2 3, padding. Position t predicts token t + 1.
    valid = np.array([[True, True, True, True, False]])
    answer = np.array([[False, False, True, True, False]])
    assert predicted(valid).tolist() == [[True, True, True, False, False]]
    assert predicted(valid, answer).tolist() == [[False, True, True, False, False]]
    assert predicted(np.ones((1, 5), bool)).tolist() == [[True, True, True, True, False]]


def test_the_next_token_is_the_one_after_each_position():
    # Logits that say log 4 for one of three tokens: probability 4/6, the others 1/6.
    sure = jnp.log(jnp.asarray([4.0, 1.0, 1.0]))
    logits = jnp.stack([jnp.roll(sure, shift) for shift in (1, 2, 0, 0, 0)])[None]
    tokens = jnp.asarray([[0, 1, 2, 1, 0]])
    right, wrong = np.log(6 / 4), np.log(6)
    found = np.asarray(next_token_loss(logits, tokens))
    np.testing.assert_allclose(found, [[right, right, wrong, right, 0]], rtol=1e-6)


def teacher_divergence(logits, logp, token):
    return prediction_losses(logits, jnp.asarray(0), logp, token)[1]


def by_hand(logits: np.ndarray, logp: np.ndarray, token: np.ndarray) -> float:
    """KL divergence over the kept tokens and one outcome of all others, float64."""
    own = np.exp(logits - logits.max())
    own /= own.sum()
    p = np.exp(logp)
    kept = own[token]
    outcomes = [*zip(p, kept, strict=True), (1 - p.sum(), 1 - kept.sum())]
    return sum(a * np.log(a / b) for a, b in outcomes if a > 0)


def test_the_divergence_has_the_rest_of_the_vocabulary_as_one_outcome():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 7))
    logp = teacher - np.log(np.exp(teacher).sum())
    token = np.argsort(-logp)[:3]
    found = teacher_divergence(
        *(jnp.asarray(x, jnp.float32) for x in (student, logp[token])), jnp.asarray(token)
    )
    np.testing.assert_allclose(found, by_hand(student, logp[token], token), rtol=1e-5)
    same = teacher_divergence(
        *(jnp.asarray(x, jnp.float32) for x in (teacher, logp[token])), jnp.asarray(token)
    )
    assert abs(float(same)) < 1e-6


def test_the_divergence_has_the_gradient_of_finite_differences():
    rng = np.random.default_rng(1)
    student, logp = rng.normal(size=7), np.log([0.5, 0.2])
    token = np.array([4, 1])
    found = jax.grad(teacher_divergence)(
        jnp.asarray(student, jnp.float32), jnp.asarray(logp, jnp.float32), jnp.asarray(token)
    )
    small, wanted = 1e-5, []
    for place in range(7):
        step = np.eye(7)[place] * small
        wanted.append(by_hand(student + step, logp, token) - by_hand(student - step, logp, token))
    np.testing.assert_allclose(found, np.array(wanted) / (2 * small), atol=1e-6)


def test_a_certain_teacher_leaves_a_finite_gradient():
    logits = jnp.asarray([1.0, 2.0, 3.0])
    found = jax.grad(teacher_divergence)(logits, jnp.zeros(1), jnp.asarray([2]))
    wanted = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum() - [0, 0, 1]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_student_that_is_too_certain_is_pulled_back_by_a_finite_gradient():
    """What it gives all others, e^-200, is no float32: their part of the loss is held at 1e-37."""
    logits, logp = jnp.asarray([200.0, 0.0, 0.0]), jnp.log(jnp.asarray([0.5]))
    found, slope = jax.value_and_grad(teacher_divergence)(logits, logp, jnp.asarray([0]))
    np.testing.assert_allclose(found, np.log(0.5) + 0.5 * 37 * np.log(10), rtol=1e-6)
    np.testing.assert_allclose(slope, [0.5, 0, 0], atol=1e-6)


def test_both_losses_at_once_have_the_gradient_of_their_sum():
    rng = np.random.default_rng(2)
    student, logp = rng.normal(size=(3, 7)), np.log([[0.5, 0.2], [0.9, 0.05], [0.3, 0.3]])
    token, following = np.array([[4, 1], [2, 6], [0, 5]]), np.array([4, 0, 1])

    def summed(logits):
        found = prediction_losses(
            logits, jnp.asarray(following), jnp.asarray(logp, jnp.float32), jnp.asarray(token)
        )
        return jnp.sum(0.25 * found[0] + 0.75 * found[1])

    def wanted(rows):
        total = 0.0
        for z, lp, t, after in zip(rows, logp, token, following, strict=True):
            nll = np.log(np.exp(z).sum()) - z[after]
            total += 0.25 * nll + 0.75 * by_hand(z, lp, t)
        return total

    logits, small = jnp.asarray(student, jnp.float32), 1e-5
    np.testing.assert_allclose(summed(logits), wanted(student), rtol=1e-6)
    slope = np.zeros_like(student)
    for place in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[place] = small
        slope[place] = (wanted(student + step) - wanted(student - step)) / (2 * small)
    np.testing.assert_allclose(jax.grad(summed)(logits), slope, atol=1e-6)
