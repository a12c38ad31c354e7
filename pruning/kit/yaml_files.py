"""Reading YAML that anybody may have written."""

from pathlib import Path
from typing import Any

import yaml

# Of a few thousand brackets the loader in Python makes minutes, libyaml's a message.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
YAML_ERRORS = (OSError, ValueError, yaml.YAMLError, RecursionError)  # a file that is none


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML file.

    Raises:
      OSError, ValueError, yaml.YAMLError, RecursionError: `YAML_ERRORS`; it cannot be read.
    """
    return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
