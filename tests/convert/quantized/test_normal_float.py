"""NF4 of a small matrix whose elements fill neither a byte nor a block, read number by number."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.quantized import normal_float
from convert.reader import SafetensorsFolder

SAID = {"quant_type": "nf4", "shape": [3, 5], "blocksize": 4, "dtype": "float32",
        "nested_blocksize": 3, "nested_offset": 0.1234}  # fmt: skip
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def stored(nested: bool, **changes) -> dict[str, np.ndarray]:
    """What stands for the matrix w: 15 elements in 8 bytes, 4 blocks, 2 blocks of blocks."""
    rng = np.random.default_rng(0)
    found = {
        "w": rng.integers(0, 256, (8, 1)).astype(np.uint8),
        "w.quant_map": rng.uniform(-1, 1, 16).astype(np.float32),
        "w.absmax": rng.uniform(0.1, 0.5, 4).astype(np.float32),
    }
    if nested:
        found["w.absmax"] = rng.integers(0, 256, 4).astype(np.uint8)
        found["w.nested_absmax"] = rng.uniform(0.1, 0.5, 2).astype(np.float32)
        found["w.nested_quant_map"] = rng.uniform(-1, 1, 256).astype(np.float32)
    state = {key: value for key, value in {**SAID, **changes}.items() if value is not ...}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return found | {"w" + normal_float.STATE: text}


def read(folder, tensors) -> tuple[list, list[str]]:
    """(the weights found, what is wrong with them)."""
    problems: list[str] = []
    save_file({name: value.copy() for name, value in tensors.items()}, folder / "model.safetensors")
    found = list(normal_float.weights(SafetensorsFolder(folder), None, problems))
    return found, problems


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_value_is_that_of_its_index_times_the_largest_of_its_block(tmp_path, nested, dtype):
    tensors = stored(nested, dtype=dtype)
    ((weight,), problems) = read(tmp_path, {**tensors, "other": np.ones(3, np.float32)})
    assert problems == [] and weight.name == "w" and set(weight.stored) == tensors.keys()
    assert weight.view.shape == (3, 5)
    flat, bytes_ = np.empty(15, np.float32), tensors["w"].reshape(-1)
    for i in range(15):
        index = bytes_[i // 2] // 16 if i % 2 == 0 else bytes_[i // 2] % 16
        largest = tensors["w.absmax"][i // 4]
        if nested:
            outer = tensors["w.nested_absmax"][i // 4 // 3]
            largest = tensors["w.nested_quant_map"][largest] * outer + np.float32(0.1234)
        flat[i] = tensors["w.quant_map"][index] * largest
    wanted = flat.reshape(3, 5).astype(DTYPES[dtype])
    np.testing.assert_array_equal(weight.view.read(), wanted, strict=True)


def test_what_is_left_out_has_a_default(tmp_path):
    tensors = stored(True, nested_blocksize=..., nested_offset=...)
    tensors["w.nested_absmax"] = tensors["w.nested_absmax"][:1]  # 256 blocks at once
    ((weight,), problems) = read(tmp_path, tensors)
    assert problems == []
    outer = tensors["w.nested_absmax"][0]
    largest = tensors["w.nested_quant_map"][tensors["w.absmax"][0]] * outer
    wanted = tensors["w.quant_map"][tensors["w"][0, 0] >> 4] * largest
    assert weight.view.read()[0, 0] == wanted


@pytest.mark.parametrize(
    "change",
    [{"shape": [0, 5]}, {"shape": [3, -5]}, {"shape": [15]}, {"shape": [3.0, 5]}, {"shape": ...},
     {"blocksize": 0}, {"blocksize": "4"}, {"nested_blocksize": 0}, {"quant_type": "fp4"},
     {"dtype": "int8"}, {"dtype": ["float32"]}, {"dtype": ...}, {"nested_offset": "0"},
     {"nested_offset": True}],
)  # fmt: skip
def test_a_state_that_says_something_else_is_refused(tmp_path, change):
    ((weight,), problems) = read(tmp_path, stored(True, **change))
    assert weight.view is None
    (problem,) = problems
    assert problem.startswith(f"w{normal_float.STATE} is no state of a matrix in NF4: {{")
    assert len(problem) < 80 + 100


@pytest.mark.parametrize("state", [b"[]", b"3", b'{"x": ', b"\xff"])
def test_a_state_that_is_no_object_is_refused(tmp_path, state):
    tensors = stored(False) | {"w" + normal_float.STATE: np.frombuffer(state, np.uint8)}
    ((weight,), problems) = read(tmp_path, tensors)
    assert weight.view is None and len(problems) == 1


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("part", ["w", "w.quant_map", "w.absmax", "w.nested_absmax",
                                  "w.nested_quant_map"])  # fmt: skip
def test_parts_of_another_size_or_kind_do_not_fit(tmp_path, nested, part):
    tensors = stored(nested)
    if part not in tensors:
        return
    for number, wrong in enumerate((tensors[part][:-1], np.repeat(tensors[part], 2, axis=0),
                                    tensors[part].astype(np.int32))):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        ((weight,), problems) = read(folder, {**tensors, part: wrong})
        assert weight.view is None
        (problem,) = problems
        assert problem.startswith("w [3, 5] has ")
        assert problem.endswith("which does not fit NF4 in blocks of 4")
        said = f"{part.rpartition('.')[2]} {wrong.dtype} {list(wrong.shape)}"
        assert said in problem and ("nested_absmax" in problem) == nested


def test_parts_may_have_axes_of_one(tmp_path):
    tensors = stored(True)
    lone = {name: value.reshape(1, -1, 1) for name, value in tensors.items()}
    ((weight,), problems) = read(tmp_path, {**tensors, **lone})
    assert problems == []
    (tmp_path / "flat").mkdir()
    ((flat,), _) = read(tmp_path / "flat", tensors)
    np.testing.assert_array_equal(weight.view.read(), flat.view.read())
