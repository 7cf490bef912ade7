"""Two ranks whose callbacks remember; ``composer -n 2 stopped_runs.py ROOT`` writes what they did."""

import json
import sys
from pathlib import Path

import torch
from composer.utils import dist
from parallel_runs import config_of
from tiny import triplet

from dhrd_plugin import train

AT_REST = ('optimizer.lr=1e-9', 'scheduler=null', 'eval_interval=2ba', 'save_interval=2ba', 'autoresume=true')
MONITOR = 'monitor: MulticlassAccuracy, dataloader_label: val'
EARLY = f'callbacks.early_stopper={{{MONITOR}, patience: 4ba}}'
THRESHOLD = f'callbacks.threshold_stopper={{{MONITOR}, threshold: -1}}'
ALONE = 'callbacks.drop_reasoning_head=null'


def write_half(root: Path) -> None:
    """Evaluation rows of which one rank gets those with a label, and the other those with probabilities alone."""
    rows = [triplet(index, 2 + index, None) for index in range(12)]
    for row in rows[1::2]:
        del row['label'], row['answer']
        row['probabilities'] = {'yes': 0.5, 'no': 0.3, 'maybe': 0.2}
    (root / 'half.jsonl').write_text('\n'.join(map(json.dumps, rows)))


def steps(root: Path, layout: str, name: str, *overrides: str) -> int:
    """Train, or go on, in a folder of this name; the batch at the end."""
    trainer = train(config_of(root, layout, 'untied', *AT_REST, f'save_folder={root / name}', *overrides))
    trainer.close()
    return int(trainer.state.timestamp.batch)


if __name__ == '__main__':
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    if dist.get_local_rank() == 0:
        write_half(root)
    shards = root, 'fsdp2'
    half = f'eval_loaders.val.source={root / "half.jsonl"}'
    best = f'callbacks.drop_reasoning_head={{output_dir: {root / "best"}, {MONITOR}}}'
    found = {
        'early': [steps(*shards, 'early', ALONE, EARLY, 'max_duration=14ba') for _ in range(2)],
        'threshold': [steps(*shards, 'threshold', ALONE, THRESHOLD, 'max_duration=8ba') for _ in range(2)],
        'new': [
            steps(*shards, 'new', ALONE, 'max_duration=2ba'),
            steps(*shards, 'new', EARLY, THRESHOLD.replace('-1', '2'), 'max_duration=4ba'),
        ],
        'half': steps(root, 'ddp', 'half', half, best, 'max_duration=2ba'),
    }
    if dist.get_global_rank() == 0:
        (root / 'found.json').write_text(json.dumps(found))
