"""Package faces whose names are imported when they are used: `--help` must not wait for jax."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_face(
    package: str,
    homes: Mapping[str, tuple[str, ...]],
    modules: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
      package: its `__name__`.
      homes: names by the module that defines them, relative to the package.
      modules: names that stand for whole modules.
    """
    whole = modules or {}
    found = {name: module for module, names in homes.items() for name in names} | dict(whole)

    def get(name: str) -> Any:
        if name not in found:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        module = importlib.import_module(f"{package}.{found[name]}")
        return module if name in whole else getattr(module, name)

    return get, lambda: sorted(found)
