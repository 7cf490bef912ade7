"""The slim classifier out of a checkpoint: ``python scripts/export.py CHECKPOINT OUT``."""

import sys

from dhrd_plugin.export.from_checkpoint import main

if __name__ == '__main__':
    sys.exit(main())
