"""Files of arrays written in pieces and read by rows, beside what safetensors makes of them."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pruning.kit.array_files import InPieces, read_rows, save_arrays

RNG = np.random.default_rng(0)
ARRAYS = {
    "w_down": RNG.normal(size=(7, 3)).astype(ml_dtypes.bfloat16),
    "b_down": RNG.normal(size=(4, 3)).astype(np.float32),
    "a.packed": RNG.integers(0, 256, (3, 5)).astype(np.uint8),
    "none": np.zeros((0, 3), np.float16),
    "many": np.arange(5),
    "one": np.array([0.5]),
}


@pytest.mark.parametrize("names", [(), ("w_down",), tuple(ARRAYS), ("a.packed", "none")])
def test_a_file_has_the_bytes_of_one_of_safetensors_however_it_is_cut(names, tmp_path):
    arrays = {name: ARRAYS[name] for name in names}
    save_file(arrays, tmp_path / "theirs")
    cut = {
        name: InPieces(a.shape, a.dtype, lambda a=a: (a[i : i + 2] for i in range(0, len(a), 2)))
        for name, a in arrays.items()
    }
    for number, some in enumerate((arrays, cut)):
        save_arrays(some, tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rows_are_those_of_the_array_and_names_that_are_not_there_are_left_out(tmp_path):
    save_arrays(ARRAYS, tmp_path / "file")
    whole = load_file(tmp_path / "file")
    rows = {"w_down": slice(2, 5), "b_down": slice(4, 4), "none": slice(0, 0), "other": slice(0, 1)}
    found = read_rows(tmp_path / "file", rows)
    assert found.keys() == {"w_down", "b_down", "none"}
    for name, value in found.items():
        assert value.dtype == whole[name].dtype
        np.testing.assert_array_equal(value, whole[name][rows[name]])
