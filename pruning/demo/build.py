"""Train the embedded demo model: `python -m pruning.demo.build --corpus DIR --work DIR`.

Interrupt and repeat the command at will: training resumes from the last orbax checkpoint.
"""

import argparse
import json
import logging
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert import find_family, layer_tensors, outer_tensors, portable_config, write_folder
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.losses import language_model_loss
from moe_jax.training import TrainingConfig, split_parameters, train
from moe_jax.transformer import Transformer, init
from pruning.demo.corpus import DOMAINS, prepare_corpus
from pruning.demo.windows import training_windows

WINDOW = 256
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: windows of one length, with a schedule of its own."""

    name: str
    window: int
    schedule: TrainingConfig


# Short windows first: three quarters of the training at half the attention cost.
STAGES = (
    Stage("short", 16, TrainingConfig(steps=5200, learning_rate=2e-3, warmup_steps=150)),
    Stage("long", WINDOW, TrainingConfig(steps=1600, learning_rate=1e-3, warmup_steps=100)),
)
CONFIG = ModelConfig(
    vocab_size=4096,
    d_model=256,
    num_layers=4,
    max_position=WINDOW,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, qk_norm=True),
    moe=MoEConfig(num_experts=16, experts_per_token=4, d_expert=128, renormalize=True),
)


def held_out_loss(model: Transformer, folder: Path, windows: int = 64) -> dict[str, float]:
    """Nats per token of each domain's held-out tokens, over at most `windows` windows."""
    score = jax.jit(lambda model, tokens: language_model_loss(model, tokens)[1]["nll"])
    losses = {}
    for domain in DOMAINS:
        tokens = np.load(folder / f"heldout_{domain}.npy").astype(np.int32)
        count = min(windows, len(tokens) // WINDOW)
        rows = tokens[: count * WINDOW].reshape(count, WINDOW)
        losses[domain] = float(np.mean([score(model, jnp.asarray(row[None])) for row in rows]))
    return losses


def train_demo(work: Path, seed: int = 0) -> Transformer:
    """Train through all stages on the prepared corpus in `work`; losses go to training.jsonl."""
    tokens = {domain: np.load(work / f"train_{domain}.npy") for domain in DOMAINS}
    parameters, rebuild = split_parameters(init(CONFIG, jax.random.key(seed)))

    def loss(parameters, batch):
        return language_model_loss(rebuild(parameters), batch, balance_weight=0.01)

    for number, stage in enumerate(STAGES):
        batch_size = BATCH_TOKENS // stage.window
        windows = training_windows(
            tokens, length=stage.window, batch_size=batch_size, seed=seed + number
        )
        parameters = train(
            parameters,
            loss,
            lambda step, windows=windows: jnp.asarray(windows.batch(step)),
            stage.schedule,
            checkpoints=work / f"checkpoints-{stage.name}",
            on_log=partial(_log, work / "training.jsonl", stage),
        )
    return rebuild(parameters)


def _log(path: Path, stage: Stage, step: int, metrics: dict[str, float]) -> None:
    row = {"stage": stage.name, "step": step, "tokens": step * BATCH_TOKENS, **metrics}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    minutes = (stage.schedule.steps - step) / metrics["steps_per_second"] / 60
    values = "  ".join(f"{key} {value:.3f}" for key, value in metrics.items())
    steps = f"{stage.name} {step}/{stage.schedule.steps}"
    print(f"{steps}  {values}  {minutes:.0f} min left", file=sys.stderr)


def hugging_face_config() -> dict:
    """config.json of the model, in the qwen3_moe family."""
    attention, moe = CONFIG.attention, CONFIG.moe
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.d_model,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.key_dim,
        "attention_bias": False,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.renormalize,
        "intermediate_size": 4 * moe.d_expert,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": CONFIG.norm_eps,
        "rope_theta": attention.rope.theta,
        "max_position_embeddings": CONFIG.max_position,
        "tie_word_embeddings": CONFIG.tie_embeddings,
        "use_sliding_window": False,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def write_model(model: Transformer, work: Path, target: Path) -> None:
    """Write the model as a bfloat16 checkpoint with its tokenizer and card."""
    family = find_family("qwen3_moe")
    tensors = dict(outer_tensors(model))
    for index, layer in enumerate(model.layers):
        tensors |= dict(layer_tensors(family, layer, index))
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    specs = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    card = model_card(work, held_out_loss(model, work), sum(v.size for v in tensors.values()))
    write_folder(
        target,
        specs,
        tensors.items(),
        portable_config(hugging_face_config()),
        work / "tokenizer",
        extra_files={"README.md": card, "NOTICE": NOTICE},
        overwrite=True,
    )


def copy_texts(work: Path, target: Path) -> None:
    """Put calibration and evaluation texts beside the model."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(work / "calibration.jsonl", target / "calibration.jsonl")
    for path in sorted((work / "evaluation").glob("*.txt")):
        shutil.copy(path, target / f"evaluation-{path.name}")
    (target / "NOTICE").write_text(NOTICE, encoding="utf-8")


NOTICE = """The model was trained on, and the texts beside it are excerpts of:

* Python standard library source and Python documentation, Copyright (c) 2001-2025 Python Software
  Foundation; all rights reserved. Python Software Foundation License Version 2.
* PostgreSQL documentation, Copyright (c) 1996-2025, The PostgreSQL Global Development Group;
  Portions Copyright (c) 1994, The Regents of the University of California. PostgreSQL License:
  permission to use, copy, modify, and distribute this software and its documentation for any
  purpose, without fee, and without a written agreement is hereby granted, provided that the above
  copyright notice and this paragraph appear in all copies.
* State of the Union speeches and Herman Melville's Moby Dick: public domain.
"""


def model_card(work: Path, losses: dict[str, float], parameters: int) -> str:
    """README.md of the model: data, schedule, losses, licence."""
    rows = [json.loads(line) for line in (work / "training.jsonl").read_text().splitlines()]
    stages = "\n".join(
        f"| {stage.name} | {stage.window} | {stage.schedule.steps} | "
        f"{stage.schedule.steps * BATCH_TOKENS / 1e6:.1f} M | {stage.schedule.learning_rate} | "
        f"{[row['nll'] for row in rows if row['stage'] == stage.name][-1]:.3f} |"
        for stage in STAGES
    )
    held_out = "\n".join(f"| {domain} | {loss:.3f} |" for domain, loss in losses.items())
    return f"""---
license: apache-2.0
---
# moe-jax demo model

A Qwen3-MoE model of {parameters / 1e6:.2f} M parameters ({CONFIG.num_layers} layers,
{CONFIG.moe.num_experts} experts of {CONFIG.moe.d_expert} channels, {CONFIG.moe.experts_per_token}
per token, vocabulary {CONFIG.vocab_size}, context {WINDOW} tokens), trained from scratch by
`python -m pruning.demo.build` with moe-jax's own training loop: AdamW, cosine schedule, balance
loss per layer (weight 0.01), {BATCH_TOKENS} tokens per step. It exists to be compressed and tested;
it knows nothing.

| stage | window | steps | tokens | peak learning rate | last training loss (nats) |
|---|---|---|---|---|---|
{stages}

Held out by document, windows of {WINDOW} tokens:

| domain | loss (nats per token) |
|---|---|
{held_out}

Data: Python standard library source and Python documentation (PSF), PostgreSQL documentation
(PostgreSQL licence), State of the Union speeches and Moby Dick (public domain); see NOTICE. The
weights are under the Apache License 2.0.
"""


def main(arguments: list[str] | None = None) -> int:
    """Prepare the corpus, train, and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.jsonl.gz documents")
    parser.add_argument("--work", type=Path, required=True, help="tokens, checkpoints and logs")
    here = Path(__file__).parent
    parser.add_argument("--output", type=Path, default=here, help="gets model/ and text/")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    if not (options.work / "train_code.npy").exists():
        prepare_corpus(options.corpus, options.work)
    model = train_demo(options.work)
    write_model(model, options.work, options.output / "model")
    copy_texts(options.work, options.output / "text")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
