"""`python -m pruning` is `moe-compress`."""

from pruning.cli import main

raise SystemExit(main())
