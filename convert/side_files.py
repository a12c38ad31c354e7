"""Files of a checkpoint beside weights and config.json: which go into every folder made of it.

Python files among them are read, to see what they need, and never run.
"""

import ast
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.errors import InputError
from moe_jax.json_files import read_json

# What programs and people look for by name; folders with all that is in them. `encoding` renders
# messages where a model has no chat template.
NAMED = (
    "tokenizer*", "tokenization_*.py", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template*",
    "additional_chat_templates", "encoding", "*processor_config.json",
    "LICENSE*", "*NOTICE*", "USE_POLICY*",
)  # fmt: skip
WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".gguf", ".h5", ".msgpack", ".onnx",
)  # fmt: skip
OWN = ("config.json", "README.md")  # every folder has its own
MAPS = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
LONGEST = 250  # bytes of a name: systems refuse to look for longer ones
TEXT_CLASSES = ("Tokenizer", "Processor", "Extractor")  # how the names of their Auto classes end


def text_classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config's `auto_map` that name code of tokenizers and processors.

    Code of models has no place beside an export, which is of a stock class or brings its own.
    """
    found = config.get("auto_map")
    if not isinstance(found, dict):
        return {}
    return {name: code for name, code in found.items() if name.endswith(TEXT_CLASSES)}


def side_files(source: Path | str) -> dict[str, Path]:
    """Files of a checkpoint that go unchanged into every folder made of it.

    They are those of known names, the code of tokenizers and processors that an `auto_map` names,
    and whatever a Python file among them imports or names that lies in the checkpoint.

    Returns:
      Name, with its folder if it has one -> path.
    """
    source = Path(source)
    waiting = [path for glob in NAMED for path in sorted(source.glob(glob))]
    waiting += _mapped_code(source)
    found: dict[str, Path] = {}
    while waiting:
        path = waiting.pop(0)
        if path.is_dir():  # a link to a folder within one may lead round in a circle
            within = (one for one in path.iterdir() if not (one.is_symlink() and one.is_dir()))
            waiting += sorted(within)
            continue
        name = path.relative_to(source).as_posix()
        if name in found or not path.is_file() or _is_apart(name):
            continue
        found[name] = path
        if path.suffix == ".py":
            waiting += _needs(path, source)
    return found


def left_out(source: Path | str) -> list[str]:
    """Files of a checkpoint that no folder made of it gets, weights and hidden files aside."""
    source, ours = Path(source), side_files(source)
    names = (path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in ours and not _is_apart(name))


def _is_apart(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
    return hidden or name in OWN or name.endswith(WEIGHTS)


def _mapped_code(source: Path) -> Iterator[Path]:
    """Modules of tokenizers and processors, as the folder's JSON files name them."""
    for name in MAPS:
        try:
            config = read_json(source / name)
        except (InputError, OSError):  # missing, or damaged: said where it is read
            continue
        mapped = config.get("auto_map")
        # tokenizer_config.json once held the pair of AutoTokenizer itself.
        values = [mapped] if isinstance(mapped, list) else text_classes(config).values()
        for value in values:
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str) and "--" not in one:  # else of another repository
                    yield from _module(source, source, one.rpartition(".")[0])


def _module(source: Path, place: Path, module: str) -> Iterator[Path]:
    """The file of a module that is looked for in `place`, or its package's folder."""
    name = module.partition(".")[0]
    if name.isidentifier() and len(name) < LONGEST and place.is_relative_to(source):
        paths = (place / f"{name}.py", place / name)
        yield from [path for path in paths if path.exists()][:1]


def _needs(path: Path, source: Path) -> Iterator[Path]:
    """Files and folders of the checkpoint that a Python file imports, or names in a text."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about its style
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # of a later Python, perhaps
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                yield from _module(source, source, one.name)
        elif isinstance(node, ast.ImportFrom):
            above = [source, *path.parents]
            place = above[node.level] if node.level < len(above) else Path()
            for module in [node.module] if node.module else [one.name for one in node.names]:
                yield from _module(source, place, module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _data(source, node.value)


def _data(source: Path, name: str) -> Iterator[Path]:
    """A file or folder of the checkpoint of this name, if there is one."""
    if len(name.encode(errors="replace")) > LONGEST or "\0" in name or not Path(name).parts:
        return
    path = source / name
    if ".." not in path.parts and not Path(name).is_absolute() and path.exists():
        yield path
