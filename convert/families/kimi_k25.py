"""Kimi-K2.5: a Kimi-K2, which is a DeepSeek-V3, that also sees images."""

import dataclasses

from convert.families import deepseek_v3
from convert.rules import Wrapper

FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    model_type="kimi_k25",
    stem="Kimi_K25",
    wrapper=Wrapper(
        {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
        default_tied=True,
    ),
    formats=("padded-bf16", "padded-int4"),
)
