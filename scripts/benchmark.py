"""How fast, against what: ``python scripts/benchmark.py infer [--output FILE.json]``."""

import sys

from dhrd_plugin.benchmark import main

if __name__ == '__main__':
    sys.exit(main())
