"""Exports on two ranks that fail and that are slow; ``composer -n 2 exports.py FOLDER`` writes what each rank met."""

import json
import sys
import time
from pathlib import Path

from composer.utils import dist, get_device

import dhrd_plugin.ranks
from dhrd_plugin.ranks import gather, initialize, on_rank_zero, rank

out = Path(sys.argv[1])


def full():
    raise OSError(28, 'No space left on device', str(out / 'slim' / 'model.safetensors'))


def broken():
    raise KeyError('weight')


def slow():
    time.sleep(8)
    return 'done'


if __name__ == '__main__':
    dist.initialize_dist(get_device('cpu'), 5.0)
    dhrd_plugin.ranks.HEARTBEAT = 1.0
    found = {}
    for work in (full, broken, slow):
        try:
            found[work.__name__] = on_rank_zero(work)
        except Exception as error:
            found[work.__name__] = f'{type(error).__name__}: {error}'
    initialize()  # nothing: Composer has
    found['gathered'] = gather(rank() * 10)
    (out / f'rank{dist.get_global_rank()}.json').write_text(json.dumps(found))
