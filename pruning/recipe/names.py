"""Names that the registries hold, for `--help`, which must not wait for their imports.

A test compares them with the registries. A name registered from outside is not here and works all
the same: a run looks names up in the registry itself.
"""

CRITERIA = (
    "act", "hidden", "weight", "noise", "energy", "amp", "shapley", "taylor", "abs_taylor",
    "fisher", "heapr", "saliency", "wanda", "moe_pruner", "wg", "obs", "random",
)  # fmt: skip
ATTRIBUTIONS = (
    "ala", "ala_clipped", "ala2", "self", "nll_grad", "nll_grad2", "nll_ig", "nll_ablate", "usage",
    "router", "seer", "ean", "reap", "man", "msan", "mone", "energy", "shapley", "abs_taylor",
    "fisher", "aimer", "weight", "uniform",
)  # fmt: skip
PLANNERS = (
    "paper", "fair_two_level", "linear_two_level", "maxmin", "fair", "fair0.5", "fair2", "linear",
    "uniform", "random", "global_topk", "normalized_topk", "layer_topk", "moe_i2", "cd_moe",
)  # fmt: skip
WEIGHTS = ("paper", "attribution", "mass", "normalized_mass", "equal")
SMOOTHINGS = ("sqrt", "identity", "power0.25", "power0.75", "log5", "log20", "clip", "huber")
