"""What every verb of the command line does alike."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from dhrd_plugin.errors import RankError, UserError

# Seconds that rank 0 gets to see and tell what another rank has seen; fewer where it perhaps never will.
GRACE = 60.0
SHORT_GRACE = 5.0


def run(work: Callable[[], Any]) -> int:
    """Run a verb; a user's mistake becomes one line on stderr and exit status 2.

    On several ranks the others let rank 0 end first: as soon as one has gone, the ``composer`` command ends all,
    be they about to tell the mistake or not, and shows nothing of those that it ended.
    """
    rank = int(os.environ.get('RANK', 0))
    try:
        work()
    except UserError as error:
        alone = isinstance(error, RankError)
        if rank == 0 or alone:
            print(f'error: {error}', file=sys.stderr, flush=True)
        if rank != 0:
            time.sleep(SHORT_GRACE if alone else GRACE)
        return 2
    return 0
