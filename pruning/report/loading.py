"""How each program loads an exported folder: the lines that people copy from card and page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Programs by the names of `convert.clients`, which decides who loads what.
T5, T4, VLLM, SGLANG, LLAMA = "transformers 5", "transformers 4.57", "vLLM", "SGLang", "llama.cpp"
INTEGERS = ("int4", "int8", "mixed")
SLOWER = "yes, slowly"
VLLM_FLAGS = {
    "ragged": " --trust-remote-code --enforce-eager",
    "layered": " --trust-remote-code",
    "padded": "",
}


@dataclass(frozen=True)
class Block:
    """Lines of one language, or prose if that is ""."""

    language: str
    text: str


@dataclass(frozen=True)
class Step:
    """What to do to load a folder in one program."""

    program: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Loading:
    """What decides how programs load a folder.

    Attributes:
      form: name of the format.
      clients: program -> (verdict "yes", "slower" or "no", the rule that says so).
      has_tokenizer: whether the folder holds a tokenizer.
      has_latent_attention: whether attention is multi-head latent.
      has_linear_attention: whether some layers attend linearly.
      auto_class: of transformers, which loads it.
    """

    form: str
    clients: Mapping[str, Sequence[str]]
    has_tokenizer: bool
    has_latent_attention: bool
    has_linear_attention: bool
    auto_class: str = "AutoModelForCausalLM"

    def verdicts(self) -> list[list[str]]:
        """Program, whether it loads the folder, and why."""
        return [
            [name, SLOWER if said == "slower" else said, rule]
            for name, (said, rule) in self.clients.items()
        ]

    def steps(self) -> list[Step]:
        """The lines for every program that loads the folder, to be run inside it."""
        loads = {name for name, (verdict, _) in self.clients.items() if verdict != "no"}
        steps = []
        if loads & {T5, T4}:
            steps.append(Step("transformers", self._transformers(T4 in loads)))
        if VLLM in loads:
            flags = VLLM_FLAGS[self.form.partition("-")[0]]
            # Its own latent attention knows stock classes only.
            setting = "VLLM_MLA_DISABLE=1 " if flags and self.has_latent_attention else ""
            steps.append(_shell("vLLM", f"{setting}vllm serve .{flags}"))
        if SGLANG in loads:
            steps.append(_shell("SGLang", "python -m sglang.launch_server --model-path ."))
        if LLAMA in loads:
            # Of Qwen3-Next it expects layers that predict further tokens, unless told otherwise.
            option = " --no-mtp" if self.has_linear_attention else ""
            steps.append(
                _shell(
                    "llama.cpp",
                    f"python LLAMA_CPP/convert_hf_to_gguf.py . --outfile model.gguf{option}\n"
                    'LLAMA_CPP/build/bin/llama-cli -m model.gguf -p "Once upon a time"',
                )
            )
        return [*steps, _shell("moe-jax", "moe-compress eval . --text FILE")]

    def _transformers(self, has_four: bool) -> tuple[Block, ...]:
        packages = '"transformers>=4.57"' if has_four else '"transformers>=5.20"'
        if self.form.endswith(INTEGERS):
            packages += ' "compressed-tensors>=0.17" accelerate'
        if self.form.endswith("fp8"):
            packages += " accelerate"
        trust = "" if self.form.startswith("padded") else ", trust_remote_code=True"
        load = f'model = {self.auto_class}.from_pretrained(".", dtype="auto"{trust})'
        if self.has_tokenizer:
            lines = [
                f"from transformers import {self.auto_class}, AutoTokenizer",
                "",
                f'tokenizer = AutoTokenizer.from_pretrained("."{trust})',
                load,
                'inputs = tokenizer("Once upon a time", return_tensors="pt")',
                "tokens = model.generate(**inputs, max_new_tokens=40)",
                "print(tokenizer.decode(tokens[0]))",
            ]
        else:
            lines = [
                "import torch",
                f"from transformers import {self.auto_class}",
                "",
                load,
                "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40))",
            ]
        blocks = [Block("sh", f"pip install torch {packages}")]
        if trust:
            modelling = (
                "The widths of the experts need the modelling file in this folder, which "
                "`trust_remote_code` allows to run; read it first."
            )
            blocks.append(Block("", modelling))
        blocks.append(Block("python", "\n".join(lines)))
        if self.form.endswith(INTEGERS):
            few = "packed" if self.form.endswith("mixed") else f"{self.form[-1]}-bit"
            memory = (
                f"transformers turns {few} weights back into 16 bits when they are "
                "used, so they save disk there and no memory. Copy the folder rather than saving "
                "the loaded model again."
            )
            blocks.append(Block("", memory))
        if self.form.endswith("fp8"):
            kernels = (
                "transformers computes with 8-bit weights on GPUs that have instructions for them "
                "(NVIDIA from Ada and Hopper on) and turns them into 16 bits elsewhere."
            )
            blocks.append(Block("", kernels))
        return tuple(blocks)


def _shell(program: str, text: str) -> Step:
    return Step(program, (Block("sh", text),))
