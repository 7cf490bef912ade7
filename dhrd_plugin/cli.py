"""What every verb of the command line does alike."""

import os
import sys
from collections.abc import Callable
from typing import Any

from dhrd_plugin.errors import UserError


def run(work: Callable[[], Any]) -> int:
    """Run a verb; a user's mistake becomes one line on stderr and exit status 2."""
    try:
        work()
    except UserError as error:
        if int(os.environ.get('RANK', 0)) == 0:
            print(f'error: {error}', file=sys.stderr, flush=True)
        return 2
    return 0
