"""Made-up calibration sums for tests that need statistics but no model."""

import numpy as np

from pruning.scores.statistics import ChannelStatistics, field_shapes

SIGNED = ("shapley", "taylor", "output_sum", "noise")


def statistics(
    L: int, E: int, F: int, *, D: int = 3, seed: int = 0, gradients: bool = True,
    expert_details: bool = True, end_to_end: bool = False, **changes,
):  # fmt: skip
    """Random sums over 100 tokens; `changes` replace single fields."""
    rng = np.random.default_rng(seed)
    groups = ["gradients", "weight-gradients", "obs"] * gradients + [
        "expert-details"
    ] * expert_details
    groups += ["nll-ig", "nll-ablate", "nll-grad2"] * end_to_end + ["weights-only"]
    fields = {}
    for name, shape in field_shapes(L, E, F, D, groups).items():
        draw = rng.normal if name in SIGNED else rng.lognormal
        fields[name] = draw(size=shape)
    fields |= {"tokens": rng.integers(1, 90, (L, E)) * 1.0, "total_tokens": np.asarray(100.0)}
    if gradients:
        fields["loss_sum"] = np.asarray(250.0)
    return ChannelStatistics.from_arrays({**fields, **changes})
