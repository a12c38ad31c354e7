"""Experts of a layer in one tensor, taken apart channel by channel and put together again."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.formats.mxfp4 import unpack
from convert.interleaved import check_shape, fuse_experts, fuse_specs, is_whole, split_experts
from convert.reader import SafetensorsFolder
from moe_jax.errors import InputError

E, D, F = 3, 5, 4
AT = "model.layers.2.mlp.experts."
TOGETHER = ["alternating", "halves"]


def stored() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"gate_up_proj": (E, D, 2 * F), "down_proj": (E, F, D),
              "gate_up_proj_bias": (E, 2 * F), "down_proj_bias": (E, D)}  # fmt: skip
    return {AT + n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


def blocks() -> dict[str, np.ndarray]:
    """In 4-bit floats: rows are channels, of two groups of 32 columns."""
    rng, found = np.random.default_rng(1), {}
    for name, rows in (("gate_up", 2 * F), ("down", D)):
        stem = f"{AT}{name}_proj"
        found[stem + "_blocks"] = rng.integers(0, 256, (E, rows, 2, 16)).astype(np.uint8)
        found[stem + "_scales"] = rng.integers(120, 134, (E, rows, 2)).astype(np.uint8)
    return found


def folder_of(path, tensors) -> SafetensorsFolder:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    return SafetensorsFolder(path)


def split(folder, together, problems=None) -> dict[str, np.ndarray]:
    found = {}
    problems = [] if problems is None else problems
    for name in folder.names:
        for public, shape, read in split_experts(folder, name, together, problems):
            found[public] = read()
            assert found[public].shape == shape and found[public].flags.c_contiguous
    return found


def channel(part: str, number: int, together: str) -> int:
    """Where a channel of gate or up lies among those of both."""
    if together == "alternating":
        return 2 * number + (part == "up")
    return number + F * (part == "up")


@pytest.mark.parametrize("together", TOGETHER)
def test_every_channel_of_every_expert_is_found_and_goes_back(tmp_path, together):
    whole = stored()
    found = split(folder_of(tmp_path, whole), together)
    assert len(found) == E * 3 * 2
    both, bias = whole[AT + "gate_up_proj"], whole[AT + "gate_up_proj_bias"]
    for expert in range(E):
        for part in ("gate", "up"):
            for number in range(F):
                place = channel(part, number, together)
                name = f"{AT}{expert}.{part}_proj."
                np.testing.assert_array_equal(found[name + "weight"][number],
                                              both[expert, :, place])  # fmt: skip
                assert found[name + "bias"][number] == bias[expert, place]
        name = f"{AT}{expert}.down_proj."
        np.testing.assert_array_equal(found[name + "weight"], whole[AT + "down_proj"][expert].T)
        np.testing.assert_array_equal(found[name + "bias"], whole[AT + "down_proj_bias"][expert])
    others = {"model.layers.2.mlp.router.weight": np.ones((E, D), np.float32)}
    back = dict(fuse_experts([*found.items(), *others.items()], E, together))
    assert back.keys() == whole.keys() | others.keys()
    for name, array in (whole | others).items():
        np.testing.assert_array_equal(back[name], array, strict=True)
    specs = {name: (array.dtype, array.shape) for name, array in (found | others).items()}
    assert fuse_specs(specs, E) == {
        name: (array.dtype, array.shape) for name, array in (whole | others).items()
    }


def test_blocks_of_four_bit_floats_are_rows_of_their_expert(tmp_path):
    whole = blocks()
    found = split(folder_of(tmp_path, whole), "alternating")
    assert len(found) == E * 3
    for expert in range(E):
        both, down = (unpack(*(whole[f"{AT}{n}_proj_{part}"][expert] for part in
                               ("blocks", "scales"))) for n in ("gate_up", "down"))  # fmt: skip
        for number, part in enumerate(("gate", "up")):
            name = f"{AT}{expert}.{part}_proj.weight"
            np.testing.assert_array_equal(found[name], both[number::2])
        np.testing.assert_array_equal(found[f"{AT}{expert}.down_proj.weight"], down)
    parts = {f"{AT}{e}.{p}_proj.weight_{kind}": (np.dtype(np.uint8), shape)
             for e in range(E) for p, rows in (("gate", F), ("up", F), ("down", D))
             for kind, shape in (("blocks", (rows, 2, 16)), ("scales", (rows, 2)))}  # fmt: skip
    assert fuse_specs(parts, E) == {n: (a.dtype, a.shape) for n, a in whole.items()}


DOWN, BOTH = AT + "down_proj", AT + "gate_up_proj"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (BOTH, np.zeros((E, D, 7), np.float32)),  # not two of each
        (BOTH, np.zeros((E, D), np.float32)),
        (BOTH, np.zeros((E, D, 8), np.int32)),
        (DOWN, np.zeros((E, D, 4, 1), np.float32)),
        (BOTH + "_bias", np.zeros((E, 7), np.float32)),
        (DOWN + "_bias", np.zeros((E, D, 1), np.float32)),
        (DOWN + "_blocks", np.zeros((E, D, 2, 16), np.uint8)),  # without scales
    ],
)
def test_a_tensor_of_another_shape_or_kind_is_named(tmp_path, name, tensor):
    problems: list[str] = []
    found = split(folder_of(tmp_path, {name: tensor}), "alternating", problems)
    (problem,) = problems
    assert not found and problem.startswith(f"{name} is {tensor.dtype} {list(tensor.shape)}; exp")


@pytest.mark.parametrize(
    "change",
    [
        {"_scales": np.zeros((E, D, 3), np.uint8)}, {"_scales": np.zeros((E, D, 2), np.int8)},
        {"_blocks": np.zeros((E, D, 2, 8), np.uint8)},
        {"_blocks": np.zeros((E, D, 2, 16), np.int8)},
    ],
)  # fmt: skip
def test_blocks_and_scales_must_fit(tmp_path, change):
    whole = blocks() | {DOWN + suffix: array for suffix, array in change.items()}
    problems: list[str] = []
    split(folder_of(tmp_path, whole), "alternating", problems)
    assert len(problems) == 1 and problems[0].startswith(DOWN + "_blocks is")


def test_scales_alone_are_named(tmp_path):
    problems: list[str] = []
    scales = {DOWN + "_scales": np.zeros((E, D, 2), np.uint8)}
    assert not split(folder_of(tmp_path, scales), "alternating", problems)
    assert problems == [f"{DOWN}_scales has no {DOWN}_blocks"]


def test_a_tensor_is_whole_by_its_name_and_in_halves_by_its_shape(tmp_path):
    folder = folder_of(tmp_path, stored())
    for name in folder.names:
        assert is_whole(folder, name, "alternating") and is_whole(folder, name, "halves")
    assert not is_whole(folder, AT + "0.gate_proj.weight", "alternating")
    # As transformers 5 has them in memory: [E, 2F, D] and [E, D, F].
    turned = {BOTH: np.zeros((E, 2 * F, D), np.float32), DOWN: np.zeros((E, D, F), np.float32)}
    folder = folder_of(tmp_path / "turned", turned)
    assert not is_whole(folder, BOTH, "halves") and not is_whole(folder, DOWN, "halves")
    assert is_whole(folder, BOTH, "alternating")
    lone = folder_of(tmp_path / "lone", {BOTH: turned[BOTH]})
    assert is_whole(lone, BOTH, "halves")


def test_square_experts_in_halves_are_refused():
    for channels in (8, 16):
        with pytest.raises(InputError, match=f"{channels} channels in a model of width 16 are sq"):
            check_shape("halves", channels, 16)
        check_shape("alternating", channels, 16)
    for channels in (4, 7, 9, 15, 17, 32):
        check_shape("halves", channels, 16)
