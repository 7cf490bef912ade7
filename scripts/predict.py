"""Classify texts: ``python scripts/predict.py runs/rte/slim "a text" ...``."""

import sys

from dhrd_plugin.predict import main

if __name__ == '__main__':
    sys.exit(main())
