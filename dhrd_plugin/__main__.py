"""``python -m dhrd_plugin VERB``: the command ``dhrd``."""

import sys

from dhrd_plugin.cli import main

if __name__ == '__main__':
    sys.exit(main())
