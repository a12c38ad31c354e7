"""The command `moe-compress`: one sub-command per stage, and `compress` for all of them."""

import argparse
import dataclasses
import errno
import json
import logging
import sys
import textwrap
from pathlib import Path

from pruning.cli.flags import add_recipe_flags, recipe_from
from pruning.kit.errors import VerificationError
from pruning.recipe.options import PlanOptions, fields_of
from pruning.recipe.recipe import CompressionRecipe

DESCRIPTION = "Make Mixture-of-Experts language models several times smaller."
EXAMPLES = {
    "compress": "moe-compress compress demo --output demo-out\n"
    "  moe-compress compress ./Qwen3-30B-A3B --calibration c4.txt code.jsonl=0.5 "
    "--prune-rate 0.25 --bits 4 --output out\n"
    "  moe-compress compress ./Qwen3-30B-A3B --weights-only --output preview",
    "inspect": "moe-compress inspect ./Qwen3-30B-A3B",
    "estimate": "moe-compress estimate demo --prune-rate 0.25 0.5\n"
    "  moe-compress estimate ./Qwen3-30B-A3B --export padded-int4 --tensor-parallel 2\n\n"
    "Takes the flags of `compress`: write `estimate` instead and see, before work: parameters,\n"
    "bytes per format, memory, disk and time, and which program loads which format and why.\n"
    "Nothing is written and no text is read; of the weights, headers are checked and one layer is\n"
    "timed. What `compress` would refuse about the model or the options is refused here.",
    "score": "moe-compress score ./Qwen3-30B-A3B --calibration c4.txt --output out",
    "plan": "moe-compress plan out --prune-rate 0.25 0.5\n\n"
    "Several rates also write out/sweep.csv and out/sweep.html: the size of every export format\n"
    "against the share of the channel score that goes. `eval` with them measures the loss.",
    "export": "moe-compress export out --export ragged-int4 padded-bf16",
    "apply": "moe-compress apply plans/0.25 ./Qwen3-30B-A3B --export ragged-int4 --output out\n\n"
    "A plan is two small files, plan.json and plan.safetensors, so that one machine can choose\n"
    "the channels and another one, which has the weights, can cut them. Nothing is scored: 4-bit\n"
    "weights are rounded to nearest. Sizes and free space are checked first, every export is read\n"
    "back and verified; `verify out` and `eval out/exports/ragged-int4` take the result.",
    "verify": "moe-compress verify out",
    "eval": "moe-compress eval out/exports/ragged-int4 --text test.txt --json quality.json\n"
    "  moe-compress eval out --prune-rate 0.25 0.5 --text test.txt --json sweep.json\n\n"
    "Several rates also write out/sweep.csv and out/sweep.html: size against added loss.",
    "report": "moe-compress report out",
    "audit": "moe-compress audit demo --experts 64 --channels 64 --output audit-out\n"
    "  moe-compress audit ./Qwen3-30B-A3B --calibration c4.txt --gradients --nll-ig 4 "
    "--experts 96 --output out\n"
    "  moe-compress audit out --experts 32\n\n"
    "A score is a guess at what an expert or channel is worth. The audit takes a random sample of\n"
    "them out of the model, one at a time, and measures how much the loss on calibration text\n"
    "rises: once with the expert's output set to zero, once with its tokens sent to others.\n"
    "It then says how well each score ranks the sample (Spearman correlation: 1 is perfect, 0 no\n"
    "better than chance), so that you can choose --attribution and --criterion for your model.\n"
    "Only scores whose statistics were collected are judged: --gradients, --expert-details,\n"
    "--weight-gradients and --nll-ig add more. An interrupted audit goes on where it stopped.\n"
    "Read audit.html first; audit.csv has a row for each expert and channel.",
    "compare": "moe-compress compare demo --prune-rate 0.25 0.5 --output rules\n"
    "  moe-compress compare ./OLMoE-1B-7B --calibration c4.txt --evaluation test.txt "
    "--rules 'fair*' 'uniform*' random --gradients --expert-details --weight-gradients "
    "--output rules",
}
AUDIT_FLAGS = (
    "output", "calibration", "calibration_field", "max_tokens", "window", "gradients",
    "expert_details", "weight_gradients", "nll_ig", "nll_ablate", "nll_grad2", "batch", "dtype",
    "seed", "overwrite",
)  # fmt: skip
FIELDS = tuple(field.name for field in dataclasses.fields(CompressionRecipe))
FUNCTIONS = {"prune": "export", "eval": "evaluate"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="moe-compress", description=DESCRIPTION)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, *aliases: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            aliases=list(aliases),
            help=summary,
            description=summary,
            epilog=f"example:\n  {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    model_help = "checkpoint folder (config.json, safetensors, tokenizer.json), or demo"
    for name, summary in (
        ("compress", "Score, plan, export, verify, evaluate and report."),
        ("score", "Measure every expert channel on calibration text; writes statistics."),
    ):
        command = add(name, summary)
        command.add_argument("model", nargs="?", help=model_help)
        command.add_argument("--recipe", type=Path, help="YAML file of options; flags win")
        add_recipe_flags(command)
    command = add("inspect", "Say what a checkpoint is, from its headers alone.")
    command.add_argument("model", help=model_help)
    command = add("estimate", "Say what a compression gives and costs, before any work.")
    _estimate_flags(command, model_help)
    command = add("plan", "Choose the channels to keep from the statistics in a folder.")
    command.add_argument("folder", type=Path, help="output folder of score or compress")
    _sweep_flag(command)
    add_recipe_flags(command, *(name for name in fields_of(PlanOptions) if name != "prune_rate"))
    command = add("export", "Write checkpoints from the plan in a folder.", "prune")
    command.add_argument("folder", type=Path, help="folder with plan.json")
    add_recipe_flags(command, "export", "mtp", "overwrite")
    command = add("apply", "Export base weights under a plan made before or elsewhere.")
    command.add_argument("plan", type=Path, help="folder with plan.json, or plan.json itself")
    command.add_argument("model", help=model_help)
    add_recipe_flags(command, "output", "export", "bits", "group_size", "mtp", "overwrite")
    command = add("verify", "Check every export in a folder against the plan.")
    command.add_argument("folder", type=Path, help="folder with plan.json and exports/")
    command = add("eval", "Measure likelihood on text; with --prune-rate, a sweep over plans.")
    _evaluation_flags(command)
    command = add("audit", "Measure how well each score ranks the true worth of experts.")
    command.add_argument("model", metavar="MODEL_OR_OUT", help=f"{model_help}; or output of score")
    _audit_flags(command)
    command = add("report", "Print the table of a finished run and write its page again.")
    command.add_argument("folder", type=Path, help="output folder of compress")
    _compare_flags(add("compare", "Rank pruning rules at equal size on held-out text."), model_help)
    return parser


def _evaluation_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="checkpoint folder, or output folder of score")
    command.add_argument(
        "--text", type=Path, nargs="+", action="extend", required=True,
        help="text files; .jsonl and .jsonl.gz hold a document a line",
    )  # fmt: skip
    command.add_argument("--text-field", default="text", help="JSON field with the text")
    command.add_argument("--json", type=Path, help="where to write the numbers (default stdout)")
    command.add_argument("--window", type=int, help="tokens per window (default: the context)")
    command.add_argument("--stride", type=int, help="tokens between windows (default: half)")
    command.add_argument("--max-tokens", type=int, default=1 << 20, help="tokens of each text")
    command.add_argument("--batch", type=int, default=8, help="windows per step")
    _sweep_flag(command)


def _audit_flags(command: argparse.ArgumentParser) -> None:
    numbers = (
        ("experts", 32, "experts to take out, spread over the layers"),
        ("channels", 64, "channels to take out, spread over the layers"),
        ("tokens", 8192, "calibration tokens the loss is measured on"),
    )
    for name, default, words in numbers:
        command.add_argument(
            f"--{name}", dest=f"sample_{name}", type=int, default=default, metavar="N",
            help=f"{words} (default {default})",
        )  # fmt: skip
    add_recipe_flags(command, *AUDIT_FLAGS)


def _estimate_flags(command: argparse.ArgumentParser, model_help: str) -> None:
    command.add_argument("model", nargs="?", help=f"{model_help}; config.json alone suffices")
    command.add_argument("--recipe", type=Path, help="YAML file of options; flags win")
    command.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N",
        help="GPUs that will share each layer in a server (default 1)",
    )  # fmt: skip
    command.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="time one layer to foretell the time of scoring (default: if weights are there)",
    )
    command.add_argument("--json", type=Path, help="where to write the numbers, too")
    _sweep_flag(command)
    add_recipe_flags(command, *(name for name in FIELDS if name not in ("model", "prune_rate")))


def _compare_flags(command: argparse.ArgumentParser, model_help: str) -> None:
    command.description = textwrap.fill(
        "Which pruning rule loses least on this model? Scores the model once, plans every rule at "
        "the same number of kept channels, and measures all plans on text that was not used for "
        "scoring, by masking: no pruned model is written. Prints a ranked table and writes "
        "compare.html, compare.csv and compare.json to the output folder. The same command goes on "
        "after an interruption. A rule's name says allocation and channel score, e.g. fair-energy; "
        "experts-NAME removes whole experts. Differences below the spread of random mean nothing."
    )
    command.add_argument("model", help=model_help)
    command.add_argument(
        "--rules", nargs="+", action="extend", metavar="RULE",
        help="standard (default; some 20 rules, forward statistics only), all, or names and "
        "patterns such as 'fair*'; all also collects gradients, which takes several times as long",
    )  # fmt: skip
    command.add_argument(
        "--evaluation-tokens", type=int, default=4096, metavar="N",
        help="tokens scored of each evaluation text (default 4096)",
    )  # fmt: skip
    _sweep_flag(command)
    add_recipe_flags(
        command, "output", "calibration", "calibration_field", "evaluation", "max_tokens",
        "window", "block", "gradients", "weight_gradients", "expert_details", "batch", "dtype",
        "seed", "overwrite",
    )  # fmt: skip


def _sweep_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prune-rate", type=float, nargs="+", action="extend", metavar="RATE",
        help="fractions of the expert channels to remove, in [0, 1)",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code (0, 1 for a failed check, 2 for bad input)."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        if options.command in ("compress", "score", "apply"):
            options.recipe = recipe_from(options)
        if options.command == "compare":
            # A recipe has one rate only.
            options.rates, options.prune_rate = options.prune_rate or [0.25, 0.5], None
            options.recipe = recipe_from(options)
        if options.command == "estimate":
            options.rates, first = options.prune_rate or [], options.prune_rate
            options.prune_rate = first[0] if first else None
            if options.recipe is None:  # nothing is written; its disk is looked at
                options.output = getattr(options, "output", "out")
            options.recipe = recipe_from(options)
        # Only now: jax takes seconds to import, and a typing error should not.
        from pruning.cli import commands

        result = getattr(commands, FUNCTIONS.get(options.command, options.command))(options)
    except VerificationError as error:
        print(f"moe-compress: verification failed: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        cure = "; free some space, then the same command goes on from here" if full else ""
        print(f"moe-compress: {error}{cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moe-compress: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if result is not None:
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
