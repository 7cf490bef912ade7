"""Show and check a set of shards: ``python scripts/inspect_data.py PATH_OR_REMOTE``."""

import sys

from dhrd_plugin.data.inspect import main

if __name__ == '__main__':
    sys.exit(main())
