"""Models by their name on the Hugging Face hub: found in its local cache, downloaded when asked.

The cache is laid out as models--OWNER--NAME/ with refs/REVISION, a file that holds a commit, and
snapshots/COMMIT/, whose files link to blobs/.
"""

import errno
import functools
import logging
import os
import re
from pathlib import Path

from moe_jax.errors import InputError
from moe_jax.json_files import read_json

NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?"
)
INDEX = "model.safetensors.index.json"
SHOWN = 5  # missing files that an error names
# Weights that we read, and whatever exports take along; no weights in other formats.
DOWNLOADED = (
    "*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md",
    "LICENSE*", "*NOTICE*", "USE_POLICY*",
)  # fmt: skip
NOT_DOWNLOADED = ("*/*.safetensors", "consolidated*")  # the same weights for other programs

logger = logging.getLogger(__name__)


def find_folder(model: str | os.PathLike, *, weights: bool = True) -> Path:
    """The folder of a checkpoint; nothing is downloaded.

    Args:
      model: a folder, which wins over a name; a folder models--OWNER--NAME of a cache; or
        OWNER/NAME. The last two may be followed by @REVISION, a branch, tag or commit.
      weights: whether config.json alone does not suffice.

    Returns:
      The folder; what is neither a folder nor spelled as a name is returned as a path.

    Raises:
      InputError: the cache has no such model or revision, or not all of its files.
    """
    if found := _cached(model):
        root, revision = found
        folder = root / "snapshots" / _commit(root, revision, str(model))
        _require_whole(folder, str(model), weights)
        return folder
    if isinstance(model, str) and (name := NAME.fullmatch(model)):
        if not Path(model).exists():
            raise InputError(
                f"{model} is no folder here, and the Hugging Face cache {_cache()} has no model of "
                "this name; check the spelling, give the path of its folder, or add --download"
            )
        if _root(name["repository"]).is_dir():
            _say_folder_wins(model)
    return Path(model)


def pinned(model: str) -> str:
    """A model as it is found again whatever its cache gets later: with the commit that it is at.

    Paths of folders stay as they are.

    Raises:
      InputError: the cache has no such revision.
    """
    found = _cached(model)
    if not found:
        return model
    commit = _commit(*found, model)
    return model if found[1] == commit else f"{model.partition('@')[0]}@{commit}"


def download(model: str, *, quiet: bool = False) -> Path:
    """Bring a model of the hub into the local cache, as far as it is not there.

    Args:
      model: OWNER/NAME or OWNER/NAME@REVISION.
      quiet: show no progress.

    Returns:
      The folder of its files in the cache.

    Raises:
      InputError: it is no such name, or cannot be had; with the cure.
      OSError: the disk is full.
    """
    name = NAME.fullmatch(model)
    if not name or Path(model).exists():
        what = "is a folder here" if Path(model).exists() else "is no name OWNER/NAME"
        raise InputError(f"--download: {model} {what}; leave out --download, or name a hub model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    if quiet and not are_progress_bars_disabled():
        disable_progress_bars()
    try:
        snapshot_download(
            name["repository"],
            revision=name["revision"],
            allow_patterns=list(DOWNLOADED),
            ignore_patterns=list(NOT_DOWNLOADED),
        )
    except (OSError, ValueError) as error:  # every error of the library is one of these
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"--download: {model} {_fault(error, name)}") from None
    return find_folder(model)


def _fault(error: Exception, name: re.Match) -> str:
    """Why a download failed and what would help."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name['repository']}"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated; accept its terms at {page} and log in with `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"is not at {page}, or not for you; check the spelling, and if it is private log in "
            "with `hf auth login` or HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {name['revision']}; look at {page}/commits/main"
    if constants.HF_HUB_OFFLINE:
        return "is not in the cache, and HF_HUB_OFFLINE forbids to look further; unset it"
    said = " ".join(str(error).split())[:300]
    return (
        f"cannot be had from {constants.ENDPOINT}: {said}; try again when the machine is online "
        "(what has come stays), or copy the model's folder from one that is and give its path"
    )


def _cache() -> Path:
    from huggingface_hub import constants  # it knows HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME

    return Path(constants.HF_HUB_CACHE)


def _root(repository: str) -> Path:
    return _cache() / f"models--{repository.replace('/', '--')}"


def _cached(model: str | os.PathLike) -> tuple[Path, str | None] | None:
    """(models--OWNER--NAME, revision) that a text or path names, None if it names another thing."""
    if Path(model).exists():
        return (Path(model), None) if _is_root(Path(model)) else None
    if not isinstance(model, str):
        return None
    path, _, revision = model.partition("@")
    if revision and _is_root(Path(path)):
        return Path(path), revision
    name = NAME.fullmatch(model)
    root = _root(name["repository"]) if name else None
    return (root, name["revision"]) if name and root and root.is_dir() else None


def _is_root(path: Path) -> bool:
    return path.resolve().name.startswith("models--") and (path / "snapshots").is_dir()


def _commit(root: Path, revision: str | None, model: str) -> str:
    """The commit of a revision, default main, if its snapshot is there."""
    wanted = revision or "main"
    reference = root / "refs" / wanted
    inside = ".." not in Path(wanted).parts
    commit = reference.read_text().strip() if inside and reference.is_file() else wanted
    if inside and (root / "snapshots" / commit).is_dir():
        return commit
    names = sorted(path.name for path in (root / "snapshots").glob("*"))
    base = model.partition("@")[0]
    known = f"it has {', '.join(f'{base}@{name}' for name in names)}" if names else "it has none"
    raise InputError(
        f"{model}: the Hugging Face cache {root} has no snapshot of revision {wanted}; {known}; "
        "name one that it has, or add --download"
    )


def _require_whole(folder: Path, model: str, weights: bool) -> None:
    """Raise InputError naming files that a snapshot lacks."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if weights:
        dangling = (path for path in folder.rglob("*") if path.is_symlink() and not path.exists())
        missing += [path.relative_to(folder).as_posix() for path in dangling]
        missing += [name for name in _shards(folder) if not (folder / name).is_file()]
    if not missing:
        return
    names = sorted(set(missing))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    broken = len(list(folder.parent.parent.glob("blobs/*.incomplete")))
    parts = f" ({broken} files came in part)" if broken else ""
    raise InputError(
        f"{model}: the download in {folder} is not complete; it lacks {', '.join(names[:SHOWN])}"
        f"{more}{parts}; finish it with --download"
    )


def _shards(folder: Path) -> set[str]:
    """The weight files that a snapshot must have."""
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX).get("weight_map")
        return set(map(str, files.values())) if isinstance(files, dict) else set()
    return set() if any(folder.glob("*.safetensors")) else {"model.safetensors"}


@functools.cache  # a run looks for its model more than once
def _say_folder_wins(model: str) -> None:
    logger.warning(
        "%s is taken for the folder here, not for the model of that name in %s", model, _cache()
    )
