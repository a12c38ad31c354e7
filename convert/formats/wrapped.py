"""A text model put back into the model of several parts that it was taken from."""

from typing import Any

from convert.rules import OF_THE_WHOLE, TEXT
from convert.side_files import text_classes


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
    whole = {key: value for key, value in outer.items() if key not in (*OF_THE_WHOLE, "auto_map")}
    if mapped := text_classes(outer):
        whole["auto_map"] = mapped
    whole |= {key: config[key] for key in OF_THE_WHOLE if key in config}
    return whole | {TEXT: text, "tie_word_embeddings": config["tie_word_embeddings"]}
