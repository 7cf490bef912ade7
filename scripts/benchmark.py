"""How fast, against what: ``python scripts/benchmark.py infer [--output FILE.json]``."""

import sys

from benchmarks.main import main

if __name__ == '__main__':
    sys.exit(main())
