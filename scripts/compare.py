"""Arms x tasks x seeds, and a report: ``python scripts/compare.py yamls/compare/superglue.yaml``."""

import sys

from dhrd_plugin.comparison.cells import main

if __name__ == '__main__':
    sys.exit(main())
