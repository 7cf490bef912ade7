"""Ask a teacher model for the rationales of a data set: ``dhrd rationales``, see ``--help``."""

import sys

from dhrd_plugin.teacher.run import main

if __name__ == '__main__':
    sys.exit(main())
