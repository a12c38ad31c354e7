"""Train the embedded demo model: `python -m pruning.demo.build --corpus DIR --work DIR`.

Interrupt and repeat the command at will: training resumes from the last orbax checkpoint.
"""

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.training import TrainingConfig, language_model_loss, split_parameters, train
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


def main(arguments: list[str] | None = None) -> int:
    """Prepare the corpus, train, and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.jsonl.gz documents")
    parser.add_argument("--work", type=Path, required=True, help="tokens, checkpoints and logs")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    if not (options.work / "train_code.npy").exists():
        prepare_corpus(options.corpus, options.work)
    model = train_demo(options.work)
    print(held_out_loss(model, options.work), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
