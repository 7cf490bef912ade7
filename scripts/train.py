"""Train a dual-head classifier: ``composer scripts/train.py yamls/rte.yaml [key=value ...]``."""

import sys

from dhrd_plugin.training.run import main

if __name__ == '__main__':
    sys.exit(main())
