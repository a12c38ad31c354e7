"""A text model put back into the model of several parts that it was taken from."""

import re
from collections.abc import Iterable
from typing import Any

from convert.rules import OF_THE_WHOLE, TEXT


def wrapped_config(config: dict[str, Any], outer: dict[str, Any]) -> dict[str, Any]:
    """config.json of a whole model whose text model was exported.

    Args:
      config: what the export says of the text model; not changed.
      outer: config.json of the whole model before; not changed.

    Returns:
      A new dict: `outer` but for the text model, the number format, and whether a head is tied.
    """
    own = ("model_type", "architectures")
    text = {key: value for key, value in config.items() if key not in (*own, "quantization_config")}
    text |= {key: outer[TEXT][key] for key in own if key in outer[TEXT]}
    gone = (*OF_THE_WHOLE, "auto_map")  # whose code does not travel
    whole = {key: value for key, value in outer.items() if key not in gone}
    whole |= {key: config[key] for key in OF_THE_WHOLE if key in config}
    return whole | {TEXT: text, "tie_word_embeddings": config["tie_word_embeddings"]}


def wrapped_modules(modules: list[str], beside: Iterable[str]) -> list[str]:
    """Names of modules that stay in 16 bits, wherever a program keeps the text model.

    Args:
      modules: those of the text model, or patterns that begin with "re:".
      beside: names of the tensors of all other parts, which stay as they are.

    Returns:
      Patterns.
    """
    parts = {name.removeprefix("model.").partition(".")[0] for name in beside}
    inner = [name.removeprefix("model.") for name in modules if not name.startswith("re:")]
    patterns = [name for name in modules if name.startswith("re:")]
    patterns += [f"re:(.*\\.)?{re.escape(name)}$" for name in inner]
    return patterns + [f"re:(model\\.)?{re.escape(part)}\\..*" for part in sorted(parts)]
