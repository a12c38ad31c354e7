"""What `compare` measures beside its rules: repairs, bits, sizes, draws, sets, other baselines."""

import argparse

from moe_jax.errors import InputError
from pruning.cli.flags import value_of
from pruning.cli.parser import LIST_ENDS
from pruning.recipe.options import COMPARED_BITS
from pruning.recipe.values import parse_amount


def add_controls(place: argparse._ActionsContainer) -> None:
    """Add the flags of `runs.controls.Controls`, all but its rates."""
    place.add_argument(
        "--repair", dest="repaired", nargs="?", const="layer", choices=("expert", "layer"),
        help="measure every plan with repair without training as well, as compress repairs by "
        "default (layer) or each expert for itself; takes a repair for every rule and rate",
    )  # fmt: skip
    place.add_argument(
        "--bits", dest="compared_bits", nargs="+", action="extend", metavar="N",
        type=_bits,
        help="measure every plan with weights of so many bits, and each of the bits without "
        "pruning (default 16); fewer are rounded to nearest as the plan's export is; auto chooses "
        "channels and bits for each layer, at the sizes of --target-bytes or --target-factor; one "
        "of " + ", ".join(COMPARED_BITS),
    )  # fmt: skip
    place.add_argument(
        "--target-bytes", dest="compared_bytes", nargs="+", action="extend", metavar="SIZE",
        type=_size,
        help="also, or without --prune-rate only, compare at equal bytes: in each of the bits "
        "every rule removes just so much that the written weights are no larger, e.g. 8GB",
    )  # fmt: skip
    place.add_argument(
        "--target-factor", dest="compared_factors", nargs="+", action="extend", metavar="X",
        type=value_of(float, is_list=True),
        help="the same by how many times smaller than the model's files, e.g. 4",
    )  # fmt: skip
    place.add_argument(
        "--draws", type=value_of(int), metavar="N",
        help="draw the calibration text so often, windows with replacement, and plan and measure "
        "all rules again: errors of losses and differences, and how far what is kept is alike; "
        "each takes as long as all the rest",
    )  # fmt: skip
    place.add_argument(
        "--calibration-sets", nargs="+", action="extend", metavar="NAME=FILE,NAME=FILE",
        help="score up to --max-tokens of each of these texts alone and measure what each keeps on "
        "a part of every one that none has shown, and on --evaluation; FILE as of --calibration, a "
        "name given twice has two files; without --calibration all else is of equal parts of all",
    )  # fmt: skip
    place.add_argument(
        "--top-k", dest="compared_top_k", nargs="+", action="extend", metavar="K",
        type=value_of(int, is_list=True),
        help="also measure the whole model with K experts per token, fewer than it has: what a "
        "token reads and computes shrinks, the folder does not",
    )  # fmt: skip
    place.add_argument(
        "--skip-below", nargs="+", action="extend", metavar="X",
        type=value_of(float, is_list=True),
        help="the same, skipping experts whose routing weight is below X times that of the "
        "token's best expert, e.g. 0.1",
    )  # fmt: skip
    place.add_argument(
        "--merge", nargs="+", action="extend", metavar="NAME",
        help="at each prune rate also merge experts, so that as many are left as the rules pay "
        "for: hc-smoe, hc-smoe-aligned, m-smoe, ream, patterns, or all",
    )  # fmt: skip
    place.add_argument(
        "--cut-router", dest="compared_cut", action="store_true",
        help="measure rules that drop whole experts also without the dropped ones' rows of the "
        "router, NAME+cut: their tokens go to other experts, as many for each as before",
    )  # fmt: skip


def _bits(word: str) -> int | str:
    found = value_of(str, COMPARED_BITS, is_list=True)(word)
    return found if found == "auto" else int(found)


def _size(word: str) -> int:
    try:
        return parse_amount("target_bytes", word)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{error}; {LIST_ENDS}") from None
