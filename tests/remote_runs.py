"""Runs of a tiny model on shards from a remote; ``composer [-n 2] tests/remote_runs.py ROOT CASES.json``.

Each case gets a folder below ROOT with the ids that each rank read, the export and the summary, or the error.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from composer.utils import dist
from configs import TASK, config_from
from tiny import tiny_lm, tiny_tokenizer, triplet

from dhrd_plugin import train
from dhrd_plugin.cli import run
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams.dataset import StreamingTripletDataset

ROWS = [triplet(i, 2 + i % 7, None if i % 5 == 4 else 1 + i % 6) for i in range(64)]
SHARD_SIZE = 50  # characters: dozens of shards


def write_inputs(root: Path) -> None:
    """The model and its tokenizer, below ``root``."""
    tiny_lm().save_pretrained(root / 'model')
    tiny_tokenizer().save_pretrained(root / 'model')


def config_of(root: Path, out: Path, *overrides: str):
    """The config of a run of two epochs that writes into ``out``."""
    settings = {
        'output_dir': str(out),
        'task': TASK,
        'max_seq_len': 64,
        'model': {'pretrained_model_name_or_path': str(root / 'model')},
        'optimizer': {'name': 'adamw', 'lr': 3e-3},
        'algorithms': {'auxiliary_reasoning_loss': {'alpha': 0.5}},
        'callbacks': {'drop_reasoning_head': {'output_dir': str(out / 'slim')}},
        'max_duration': '2ep',
        'global_train_batch_size': 8,
        'log_to_console': False,
        'device': 'cpu',
    }
    return config_from(settings, out, *overrides)


def read_ids(out: Path) -> list[str]:
    """The ids of the training rows that all ranks of a run have read."""
    return [line for path in out.glob('ids*') for line in path.read_text().split()]


@contextmanager
def ids_written(path: Path) -> Iterator[None]:
    """Writes the id of every row that is streamed meanwhile."""
    rows = StreamingTripletDataset.__iter__

    def noted(self):
        for row in rows(self):
            with path.open('a') as file:
                file.write(f'{row["id"]}\n')
            yield row

    StreamingTripletDataset.__iter__ = noted
    yield
    StreamingTripletDataset.__iter__ = rows


def run_case(root: Path, case: dict) -> None:
    """One training, by the settings of a case: ``name``, ``overrides``, ``env``, and whether it ``fails``."""
    out, rank = root / case['name'], dist.get_global_rank()
    os.environ.update(case.get('env', {}))
    config = config_of(root, out, *case['overrides'])
    try:
        with ids_written(out / f'ids{rank}'):
            train(config).close()
    except UserError as error:
        if not case.get('fails'):
            raise
        (out / f'error{rank}').write_text(str(error))


def run_alone(root: Path, case: dict) -> None:
    """The work of a process that can be killed with all that it has started."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method('fork', force=True)  # as in any other program: of the loader's workers
    torch.set_num_threads(1)
    run_case(root, case)


if __name__ == '__main__':
    torch.set_num_threads(1)
    root, cases = sys.argv[1:]
    sys.exit(run(lambda: [run_case(Path(root), case) for case in json.loads(Path(cases).read_text())]))
