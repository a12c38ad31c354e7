"""What the dense model and an export write: the starts of texts, continued by both."""

from convert.checkpoint import load_model
from moe_jax.generation import generate
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import free_memory, release_memory
from pruning.kit.progress import Steps
from pruning.kit.words import amount
from pruning.stages.job import Job
from pruning.stages.sizes import SAMPLE_BYTES, export_of, folder_bytes, form_of, sample_memory

PROMPT_TOKENS, NEW_TOKENS = 24, 40
SAMPLES = 8  # texts that are continued, at most


def continued(job: Job, plan: PruningPlan, steps: Steps) -> tuple[list[dict[str, str]], str]:
    """The start of every text continued by the dense model and by the smallest export; [] and the
    reason why not for a large model or without a text."""
    folders = [job.output / "exports" / name for name in job.recipe.export]
    folder = min(folders, key=folder_bytes)
    shown = dict(list(job.evaluation.items())[:SAMPLES]) or {"calibration": job.calibration}
    starts = {
        text: windows.tokens[0, windows.valid[0]][:PROMPT_TOKENS].tolist()
        for text, windows in shown.items()
        if len(windows.tokens)
    }
    size = folder_bytes(job.base.about.folder)
    if not starts:
        return [], "there was no text to continue"
    if size > SAMPLE_BYTES:
        return [], f"the model has {amount(size)}; those above {amount(SAMPLE_BYTES)} write slowly"
    export = export_of(job.base.about, plan, form_of(job.recipe, folder.name, plan))
    needed, free = sample_memory(job.base.about, export), free_memory()
    if needed > free:
        return [], f"it takes about {amount(needed)} of memory and {amount(free)} are free"
    stop = () if job.codec.end is None else (job.codec.end,)
    written: dict[str, dict[str, str]] = {}
    with steps.bar("sample"):
        for name, path in (("dense", job.base.about.folder), ("compressed", folder)):
            model = load_model(path)
            for text, prompt in starts.items():
                room = min(NEW_TOKENS, job.base.config.max_position - len(prompt))
                # One by one: in a batch the last bits of a sum, and so a token, may differ.
                (new,) = generate(model, [prompt], max_new_tokens=room, stop=stop)
                written.setdefault(text, {})[name] = job.codec.decode(new)
            del model  # before the next one is read
            release_memory()
    samples = [
        {"text": text, "prompt": job.codec.decode(prompt), **written[text], "export": folder.name}
        for text, prompt in starts.items()
    ]
    return samples, ""
