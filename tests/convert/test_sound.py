"""Which tensors were found to hold numbers alone, and what is said of the others: no folder."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.reader import CheckpointError
from convert.sound import PIECE, Sound
from convert.view import View

FOLDER = Path("/a/model")
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
CURE = "holds NaN or infinity; download the checkpoint again"


def views(read: list[str], **arrays) -> dict[str, View]:
    """Tensors that say when they are read."""

    def of(name, array):
        return View(array.shape, lambda: read.append(name) or array)

    return {name: of(name, np.asarray(array)) for name, array in arrays.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_value_that_is_no_number_is_found(dtype, value):
    array = np.full((3, 4), 1.0, dtype)
    array[0, 0] = np.finfo(dtype).max if dtype is not ml_dtypes.bfloat16 else 3e38
    array[0, 1] = -array[0, 0]
    found = Sound(FOLDER).read("w", View((3, 4), lambda: array))
    assert found is array
    wrong = array.copy()
    wrong[2, 3] = value
    with pytest.raises(CheckpointError) as error:
        Sound(FOLDER).read("w", View((3, 4), lambda: wrong))
    assert error.value.problems == (f"w {CURE}",) and str(FOLDER) in str(error.value)


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE, -1])
def test_it_is_found_in_whatever_piece_of_a_large_tensor(place):
    wrong = np.ones((2, PIECE + 2), ml_dtypes.bfloat16)
    Sound(FOLDER).read("w", View(wrong.shape, lambda: wrong))
    wrong.reshape(-1)[place] = np.nan
    with pytest.raises(CheckpointError):
        Sound(FOLDER).read("w", View(wrong.shape, lambda: wrong))


def test_integers_are_numbers():
    array = np.arange(3)
    assert Sound(FOLDER).read("w", View((3,), lambda: array)) is array


def test_a_tensor_that_was_found_sound_is_not_looked_at_again():
    sound, array = Sound(FOLDER), np.ones(3)
    view = View((3,), lambda: array)
    sound.read("w", view)
    array[0] = np.nan
    sound.read("w", view)
    with pytest.raises(CheckpointError):
        sound.read("v", view)
    with pytest.raises(CheckpointError):
        sound.read("v", view)  # nor is a bad one forgotten


def test_what_was_not_read_meanwhile_is_read_at_the_end():
    sound, read, told = Sound(FOLDER), [], []
    tensors = views(read, a=[1.0], b=[2.0], c=[3.0])
    with sound.checking(tensors, lambda *step: told.append(step)):
        sound.read("b", tensors["b"])
    assert read == ["b", "a", "c"] and told == [(1, 3), (2, 3), (3, 3)]
    with sound.checking(tensors):
        pass
    assert len(read) == 3


def test_all_bad_tensors_are_named_whenever_they_were_read():
    read: list[str] = []
    tensors = views(read, a=[np.nan], b=[1.0], c=[np.inf], d=[np.nan])
    sound = Sound(FOLDER)
    with pytest.raises(CheckpointError) as error, sound.checking(tensors):
        sound.read("c", tensors["c"])
        raise AssertionError("the work goes on")
    assert error.value.problems == tuple(f"{name} {CURE}" for name in "acd")
    with pytest.raises(CheckpointError) as error, Sound(FOLDER).checking(tensors):
        pass
    assert error.value.problems == tuple(f"{name} {CURE}" for name in "acd")


def test_another_fault_comes_out_after_the_rest_was_read():
    read: list[str] = []
    fault = CheckpointError(FOLDER, ["another"])
    with pytest.raises(CheckpointError) as error, Sound(FOLDER).checking(views(read, a=[1.0])):
        raise fault
    assert error.value is fault and read == ["a"]
    with pytest.raises(KeyError), Sound(FOLDER).checking(views(read, a=[1.0])):
        raise KeyError("other")
    assert read == ["a"]
