"""How each client loads an exported folder: the part of its card that people copy."""

from collections.abc import Mapping

# Clients by the names of `convert.clients`, which decides who loads what.
T5, T4, VLLM, SGLANG, LLAMA = "transformers 5", "transformers 4.57", "vLLM", "SGLang", "llama.cpp"

VLLM_FLAGS = {
    "ragged": " --trust-remote-code --enforce-eager",
    "layered": " --trust-remote-code",
    "padded": "",
}


def loading(
    form: str,
    clients: Mapping[str, tuple[str, str]],
    *,
    has_tokenizer: bool,
    has_latent_attention: bool,
    has_linear_attention: bool,
) -> str:
    """Which clients load a folder by which rule, and the lines that do it.

    Args:
      form: name of the format.
      clients: client -> (verdict "yes", "slower" or "no", the rule that says so).
      has_tokenizer: whether the folder holds a tokenizer.
      has_latent_attention: whether attention is multi-head latent.
      has_linear_attention: whether some layers attend linearly.

    Returns:
      Markdown; a client that does not load the folder has no snippet.
    """
    loads = {name for name, (verdict, _) in clients.items() if verdict != "no"}
    words = {"slower": "yes, slowly"}
    rows = [
        f"| {name} | {words.get(said, said)} | {rule} |" for name, (said, rule) in clients.items()
    ]
    parts = [
        "By the rules of each program, not by a trial of this very folder:",
        "\n".join(["| program | loads it | why |", "|---|---|---|", *rows]),
        "All lines below are for a shell or a Python in this folder; elsewhere write its path or "
        "its name on the Hub instead of `.`.",
    ]
    if loads & {T5, T4}:
        parts.append(_transformers(form, loads, has_tokenizer))
    if VLLM in loads:
        flags = VLLM_FLAGS[form.partition("-")[0]]
        # Its own latent attention knows stock classes only.
        setting = "VLLM_MLA_DISABLE=1 " if flags and has_latent_attention else ""
        parts.append(f"### vLLM\n\n{_code('sh', f'{setting}vllm serve .{flags}')}")
    if SGLANG in loads:
        line = "python -m sglang.launch_server --model-path ."
        parts.append(f"### SGLang\n\n{_code('sh', line)}")
    if LLAMA in loads:
        # Of Qwen3-Next it expects layers that predict further tokens, unless told otherwise.
        option = " --no-mtp" if has_linear_attention else ""
        lines = (
            f"python LLAMA_CPP/convert_hf_to_gguf.py . --outfile model.gguf{option}\n"
            'LLAMA_CPP/build/bin/llama-cli -m model.gguf -p "Once upon a time"'
        )
        parts.append(f"### llama.cpp\n\n{_code('sh', lines)}")
    parts.append(f"### moe-jax\n\n{_code('sh', 'moe-compress eval . --text FILE')}")
    return "\n\n".join(parts)


def _transformers(form: str, loads: set[str], has_tokenizer: bool) -> str:
    packages = '"transformers>=4.57"' if T4 in loads else '"transformers>=5.20"'
    if form.endswith("int4"):
        packages += ' "compressed-tensors>=0.17" accelerate'
    trust = "" if form.startswith("padded") else ", trust_remote_code=True"
    load = f'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto"{trust})'
    if has_tokenizer:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
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
            "from transformers import AutoModelForCausalLM",
            "",
            load,
            "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40))",
        ]
    parts = ["### transformers", _code("sh", f"pip install torch {packages}")]
    if trust:
        parts.append(
            "The widths of the experts need the modelling file in this folder, which "
            "`trust_remote_code` allows to run; read it first."
        )
    parts.append(_code("python", "\n".join(lines)))
    if form.endswith("int4"):
        parts.append(
            "transformers turns 4-bit weights back into 16 bits when they are used, so they save "
            "disk there and no memory. Copy the folder rather than saving the loaded model again."
        )
    return "\n\n".join(parts)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
