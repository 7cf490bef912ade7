"""A run that exports its best evaluation, calibrated; ``composer [-n 2] chosen_runs.py ROOT LAYOUT CASE
[key=value ...]``."""

import sys
from pathlib import Path

import torch
from parallel_runs import config_of

from dhrd_plugin import train

CHOICE = 'monitor: MulticlassAccuracy, mode: max, dataloader_label: val, calibrate: val'

if __name__ == '__main__':
    torch.set_num_threads(1)
    root, layout, case, *more = sys.argv[1:]
    out = Path(root) / layout / case / 'slim'
    overrides = [f'callbacks.drop_reasoning_head={{output_dir: {out}, {CHOICE}}}', 'eval_interval=2ba', *more]
    train(config_of(Path(root), layout, case, *overrides)).close()
