"""Weights in the published formats of few bits, from random numbers: what folders are made of.

Each function gives the tensors that stand for one weight [rows, columns], and its values by a rule
that shares nothing with the library: the format's own package where that can be installed, else
one number after the other.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor]  # names behind the module's, and the values of its weight
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1, "num_experts": 4}


def rewrite(plain: Path, target: Path, make: Callable[[str, torch.Size], Made | None], said: dict):
    """A folder whose linear weights are made anew; values of all its tensors by name."""
    target.mkdir()
    stored: Tensors = {}
    exact: Tensors = {}
    for name, value in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        made = make(module, value.shape) if name.endswith("_proj.weight") else None
        if made is None:
            stored[name] = exact[name] = value
            continue
        stored |= {f"{module}.{part}": tensor.contiguous() for part, tensor in made[0].items()}
        exact[name] = made[1]
    save_file(stored, target / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return exact


def compressed(form: str, *, dtype=torch.bfloat16, seed=0, **weights: Any):
    """compressed-tensors: (how weights are made, the group in config.json)."""
    generator = torch.Generator().manual_seed(seed)
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    low, high = -(1 << (args.num_bits - 1)), 1 << (args.num_bits - 1)

    def make(module: str, shape: torch.Size) -> Made:
        rows, columns = shape
        groups = columns // (args.group_size or 1)
        tables = {"tensor": (1,), "channel": (rows, 1), "group": (rows, groups)}
        table = tables.get(args.strategy)
        if table is None:
            table = tuple(-(-n // b) for n, b in zip(shape, args.block_structure, strict=True))
        scale = (torch.rand(table, generator=generator) * 0.05 + 0.001).to(dtype)
        state = {"weight": torch.randn(shape, generator=generator), "weight_scale": scale}
        if not args.symmetric:
            zero = torch.randint(low, high, table, generator=generator, dtype=torch.int8)
            state["weight_zero_point"] = zero
        stored = compressor.compress(state, scheme)
        return stored, compressor.decompress(dict(stored), scheme)["weight"]

    return make, {"targets": ["Linear"], "weights": dict(weights)}


def awq(group_size: int, *, seed=0):
    """AutoAWQ, layout gemm: random words; read by compressed-tensors' converter."""
    generator = torch.Generator().manual_seed(seed)

    def make(module: str, shape: torch.Size) -> Made:
        outputs, inputs = shape
        size = inputs if group_size == -1 else group_size
        stored = {
            "qweight": _words(generator, inputs, outputs // 8),
            "qzeros": _words(generator, inputs // size, outputs // 8),
            "scales": (torch.rand((inputs // size, outputs), generator=generator) * 0.1).half(),
        }
        found = AutoAWQConverter(group_size=size).process({f"m.{k}": v for k, v in stored.items()})
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(num_bits=4, symmetric=False, group_size=size),
        )
        packed = BaseCompressor.get_value_from_registry("pack-quantized")
        state = {name.removeprefix("m."): value for name, value in found.items()}
        return stored, packed.decompress(state, scheme)["weight"]

    said = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm",
            "zero_point": True, "modules_to_not_convert": ["gate"]}  # fmt: skip
    return make, said


def gptq(bits: int, group_size: int, *, act_order=False, version=1, dtype=torch.float16, seed=0):
    """GPTQ, written and read number by number."""
    rng = np.random.default_rng(seed)

    def make(module: str, shape: torch.Size) -> Made:
        outputs, inputs = shape
        size = inputs if group_size == -1 else group_size
        codes = rng.integers(0, 1 << bits, (inputs, outputs))
        zeros = rng.integers(0, 1 << bits, (inputs // size, outputs))
        scales = torch.from_numpy(rng.uniform(0.001, 0.1, zeros.shape)).to(dtype)
        group = np.arange(inputs) // size
        if act_order:
            group = rng.permutation(group)
        words = [_word(row, bits) for row in zeros.reshape(len(zeros), -1, 32 // bits)]
        ones = sum(1 << shift for shift in range(0, 32, bits))
        stored = {
            "qweight": _int32([_word(row, bits) for row in
                               codes.T.reshape(outputs, -1, 32 // bits)]).T,
            "qzeros": _int32([[(w - ones * (version == 1)) % 2**32 for w in row] for row in words]),
            "scales": scales,
        }  # fmt: skip
        if act_order:
            stored["g_idx"] = torch.from_numpy(group).int()
        values = torch.empty(shape, dtype=dtype)
        for i in range(inputs):
            differences = torch.from_numpy(codes[i] - zeros[group[i]]).to(dtype)
            values[:, i] = scales[group[i]] * differences
        return stored, values

    said = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order,
            "sym": False, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}  # fmt: skip
    return make, said


def nf4(*, nested: bool, dtype="bfloat16", seed=0):
    """bitsandbytes NF4 in blocks of 64, read number by number."""
    rng = np.random.default_rng(seed)
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    inner = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)

    def make(module: str, shape: torch.Size) -> Made:
        size = shape[0] * shape[1]
        index = rng.integers(0, 16, size)
        blocks = size // 64
        state: dict[str, Any] = {
            "quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(shape),
        }  # fmt: skip
        stored = {
            "weight": torch.tensor([[16 * a + b] for a, b in index.reshape(-1, 2)]).to(torch.uint8),
            "weight.quant_map": torch.from_numpy(table.copy()),
        }
        largest = rng.uniform(0.1, 0.5, blocks).astype(np.float32)
        if nested:
            places = rng.integers(0, 256, blocks)
            outer = rng.uniform(0.1, 0.5, -(-blocks // 256)).astype(np.float32)
            offset = 0.1234
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            stored |= {
                "weight.absmax": torch.from_numpy(places).to(torch.uint8),
                "weight.nested_absmax": torch.from_numpy(outer),
                "weight.nested_quant_map": torch.from_numpy(inner.copy()),
            }
            largest = [
                inner[p] * outer[i // 256] + np.float32(offset) for i, p in enumerate(places)
            ]
        else:
            stored["weight.absmax"] = torch.from_numpy(largest)
        text = json.dumps(state).encode()
        stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text)).to(torch.uint8)
        values = [table[code] * largest[i // 64] for i, code in enumerate(index)]
        exact = torch.tensor(np.array(values, np.float32)).reshape(shape)
        return stored, exact.to(getattr(torch, dtype))

    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": dtype}  # fmt: skip
    return make, said


def _words(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    return torch.randint(
        -(2**31), 2**31, (rows, columns), generator=generator, dtype=torch.int64
    ).int()


def _word(parts: np.ndarray, bits: int) -> list[int]:  # [words, per word] -> words
    return [sum(int(n) << (bits * i) for i, n in enumerate(word)) for word in parts]


def _int32(words: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))
