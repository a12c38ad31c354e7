"""Whether the tokenizer of an export gives the ids of the base's in the programs that read it."""

import functools
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from convert.export import Export
from convert.side_files import side_files
from pruning.stages.client import Ids, client_ids

FAST = "tokenizer.json"
KINDS = (FAST, "tokenizer_config.json", "tokenization_*.py", "*.model", "*.tiktoken", "vocab.*")
TEXTS = {
    "Latin": "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich; l'été, œuvre, İstanbul.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Cyrillic": "Съешь же ещё этих мягких французских булок.",
    "Hebrew": "דג סקרן שט בים מאוכזב",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Chinese": "视野无限广。窗外有蓝天。",
    "Japanese": "いろはにほへと、ちりぬるを。カタカナ",
    "Korean": "키스의 고유조건은 입술끼리 만나야 한다.",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 1️⃣",
    "code": "def f(x):\n\treturn  [x[i:i+3] for i in range(0, 1234567, 89)]   # \r\n\n",
}


def tokenizer_result(
    folder: Path, export: Export, *, trusted: bool
) -> tuple[bool, str, bool] | None:
    """Compare token ids of an export's tokenizer with those of its base's on text in many scripts.

    Code that a tokenizer brings is not run: its files are only compared, by `file_problems`.

    Args:
      folder: the export.
      export: what it holds.
      trusted: whether all files of the folder are as planned: our own code there may be run.

    Returns:
      (whether nothing is wrong, what was found, whether anything was compared); None if the base
      has no tokenizer.
    """
    base = export.base.folder
    if not any(path for kind in KINDS for path in base.glob(kind)):
        return None
    code = [name for name in side_files(base) if name.endswith(".py")]
    in_transformers = functools.partial(client_ids, trusted=(folder,) if trusted else ())
    programs = {"tokenizers": _fast_ids, "transformers": in_transformers}
    readers, reasons, faults, count = [], [], [], 0
    if code:  # without it transformers may take a class of its own, and find no word
        del programs["transformers"]
    for reader, ids in programs.items():
        wanted, found = ids((base, folder), tuple(TEXTS.values()))
        if isinstance(wanted, str):
            reasons.append(f"{reader}: {wanted}")
        elif isinstance(found, str):
            faults.append(f"{reader} reads the base's but not this one: {found}")
        elif wanted != found:
            pairs = zip(TEXTS, wanted, found, strict=True)
            other = [script for script, one, two in pairs if one != two]
            faults.append(f"{reader} gives other ids than with the base's: {', '.join(other)}")
        else:
            readers.append(reader)
            count = sum(map(len, wanted))
    apart = f"; its own code is compared but not run: {', '.join(code)}" if code else ""
    if faults:
        return False, "; ".join(faults) + apart, True
    if not readers:
        return True, f"not done: {'; '.join(reasons)}{apart}", False
    detail = f"the base's {count} ids on text in {len(TEXTS)} scripts, by {' and '.join(readers)}"
    return True, detail + apart, True


def _fast_ids(folders: Sequence[Path], texts: Sequence[str]) -> list[Ids | str]:
    """As of `client_ids`, of the tokenizers package."""
    found: list[Ids | str] = []
    for folder in folders:
        if not (folder / FAST).is_file():
            found.append(f"there is no {FAST}")
            continue
        try:
            tokenizer = Tokenizer.from_file(str(folder / FAST))
        except Exception as error:  # the package raises plain Exception
            found.append(str(error))
        else:
            found.append([tokenizer.encode(text).ids for text in texts])
    return found
