"""Ten thousand damaged folders, checkpoints of four families and outputs of ours; see
`tests/support/mutations.py`.

`python tests/bench/mutate_folders.py [--cases 10000]` prints what neither opened nor was refused.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.convert.test_mutations import folders  # noqa: E402


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="damaged folders (10000)")
    parser.add_argument("--first", type=int, default=1_000, help="first seed (1000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for family, folder in folders(Path(place)).items():
            print(family, flush=True)
            command = [sys.executable, "-m", "tests.support.mutations", str(folder)]
            share = options.cases // 5
            subprocess.run([*command, str(options.first), str(share)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
