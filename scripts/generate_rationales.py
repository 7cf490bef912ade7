"""Ask a teacher model for the rationales of a data set: see `--help` and dhrd_plugin/data/teacher.py."""

import sys

from dhrd_plugin.data.teacher import main

if __name__ == '__main__':
    sys.exit(main())
