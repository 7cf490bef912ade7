"""What exported classifiers say in a process that cannot import the package."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def load_elsewhere(root: Path, texts: list[str], labels: torch.Tensor | dict[str, torch.Tensor]) -> dict:
    """Load every ``root/NAME/slim`` there.

    Args:
        root: holds the exports.
        texts: N texts to classify.
        labels: [N] class indices, for the loss; or those of each NAME.

    Returns:
        By name, what ``load_slim.py`` found.
    """
    torch.save({'texts': texts, 'labels': labels}, root / 'inputs.pt')
    script = Path(__file__).with_name('load_slim.py')
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(root / 'hf'), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, str(script), str(root)], cwd=root, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(root / 'found.pt', weights_only=True)
