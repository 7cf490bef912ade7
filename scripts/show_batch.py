"""Show rows as the model sees them: ``python scripts/show_batch.py yamls/rte.yaml [key=value ...]``."""

import sys

from dhrd_plugin.show_batch import main

if __name__ == '__main__':
    sys.exit(main())
