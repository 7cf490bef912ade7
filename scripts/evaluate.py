"""How good a classifier is on rows with labels: ``python scripts/evaluate.py runs/rte/slim FILE``."""

import sys

from dhrd_plugin.evaluate import main

if __name__ == '__main__':
    sys.exit(main())
