"""Write a data set as shards of triplets: ``python scripts/prepare_data.py --task rte --input DIR --output OUT``."""

import sys

from dhrd_plugin.data.prepare import main

if __name__ == '__main__':
    sys.exit(main())
