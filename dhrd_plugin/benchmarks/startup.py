"""What importing the package costs."""

import subprocess
import sys
from functools import partial
from typing import Any

from dhrd_plugin.benchmarks.measure import interleave, ratios
from dhrd_plugin.benchmarks.table import make_row


def import_row(repetitions: int) -> dict[str, Any]:
    """``import dhrd_plugin`` against ``import composer``, each in a fresh interpreter."""
    works = {name: partial(run_fresh, f'import {name}') for name in ('dhrd_plugin', 'composer')}
    seconds = interleave(works, repetitions)
    ratio = ratios(seconds['dhrd_plugin'], seconds['composer'])
    return make_row('import dhrd_plugin', seconds['dhrd_plugin'], 's', ratio, 'import composer', at_most=1.05)


def run_fresh(code: str) -> None:
    """Run a program in an interpreter of its own."""
    subprocess.run([sys.executable, '-c', code], check=True)
