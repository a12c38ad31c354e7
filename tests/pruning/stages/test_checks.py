"""When checks fail a run; what logits may differ in is in `measure/test_settled`."""

import numpy as np
import pytest

from pruning.kit.errors import VerificationError
from pruning.stages.checks import Check, logit_check, long_check, require_verified


def test_a_run_fails_by_the_checks_that_failed_and_names_each():
    fine, undone = Check("e", "a", True, "x"), Check("e", "b", True, "not done: y", done=False)
    assert fine.done
    require_verified([])
    require_verified([fine, undone])
    wrong = [
        Check("ragged-bf16", "tensors", False, "one"),
        Check("padded-int4", "files", False, "b"),
    ]
    with pytest.raises(VerificationError) as error:
        require_verified([fine, *wrong, undone])
    said = (
        "ragged-bf16: tensors: one; padded-int4: files: b. Do not use the folder: export it again"
    )
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("check", [logit_check, long_check])
def test_the_largest_difference_of_a_position_counts_whatever_its_sign(check):
    wanted = np.zeros((2, 16, 3), np.float32)
    settled = [np.ones((2, 16), bool)] if check is logit_check else []
    for sign in (1, -1):
        found = wanted.copy()
        found[:, :, 1] = sign * 0.5
        found[:, :, 2] = sign * 0.1
        wrong = check("e", "n", found, wanted, *settled)
        assert not wrong.ok and (wrong.export, wrong.check, wrong.done) == ("e", "n", True)
        assert not check("e", "n", wanted, found * 1e-2, *settled).ok
    assert check("e", "n", wanted, wanted, *settled).ok


@pytest.mark.parametrize(("column", "decides"), [(0, False), (1, True), (3, True)])
def test_positions_that_see_another_decide(column, decides):
    wanted = np.zeros((20, 4, 3), np.float32)
    settled = np.zeros((20, 4), bool)
    settled[:, column] = True
    found = np.where(settled[..., None], wanted, 0.5).astype(np.float32)
    assert logit_check("e", "n", found, wanted, settled).ok == decides


@pytest.mark.parametrize("check", [logit_check, long_check])
def test_a_difference_as_large_as_the_limit_is_none(check):
    wanted = np.zeros((1, 16, 3), np.float32)
    settled = [np.ones((1, 16), bool)] if check is logit_check else []
    limit = np.float32(2e-3)
    assert check("e", "n", np.full_like(wanted, limit), wanted, *settled).ok
    above = np.full_like(wanted, np.nextafter(limit, np.float32(1)))
    assert not check("e", "n", above, wanted, *settled).ok
