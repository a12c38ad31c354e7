"""Made-up calibration sums for tests that need statistics but no model."""

import numpy as np

from pruning.statistics import ChannelStatistics

CHANNEL_SUMS = ("hidden_square", "up_square", "gate_square", "weighted_square", "energy")
NORMS = ("down_norm", "up_norm", "gate_norm")
GRADIENT_SUMS = ("taylor", "abs_taylor", "fisher")
OUTPUT_NORMS = ("output_norm", "weighted_output_norm", "output_square")


def statistics(L: int, E: int, F: int, *, seed: int = 0, gradients: bool = True, **changes):
    """Random sums over 100 tokens; `changes` replace single fields."""
    rng = np.random.default_rng(seed)
    fields = {name: rng.lognormal(size=(L, E, F)) for name in (*CHANNEL_SUMS, *NORMS)}
    fields |= {"shapley": rng.normal(size=(L, E, F)), "taylor": rng.normal(size=(L, E, F))}
    fields |= {name: rng.lognormal(size=(L, E, F)) for name in ("abs_taylor", "fisher")}
    if not gradients:
        fields |= {name: np.zeros((L, E, F)) for name in GRADIENT_SUMS}
    fields |= {name: rng.lognormal(size=(L, E)) for name in ("kappa", "gate_mass", *OUTPUT_NORMS)}
    fields |= {"phi": rng.lognormal(size=(L, E)), "tokens": rng.integers(1, 90, (L, E)) * 1.0}
    fields |= {"layer_energy": rng.lognormal(size=L), "router_entropy": rng.lognormal(size=L)}
    scalars = {"total_tokens": 100.0, "loss_sum": 250.0, "has_gradients": gradients}
    return ChannelStatistics(**{**fields, **scalars, **changes})
