"""A small run, whole: a random model, rows with several rationales, a YAML; and what it ends with.

A run writes to ``out`` in the folder where it is started. ``composer -n 2 tests/runs.py YAML [key=value ...]`` is
``scripts/train.py`` but for a note of the rows that each rank reads, in ``rows-rank0.txt`` and so on.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from composer.utils import dist
from forks import Popen
from omegaconf import OmegaConf
from tiny import LABELS, tiny_lm, tiny_tokenizer, triplet

import dhrd_plugin.training.run
from dhrd_plugin.callbacks.token_counter import TokenCounter

ROOT = Path(__file__).parent.parent
EPOCH = 20  # steps
STEPS = 3 * EPOCH
BATCH = 4


def write_run(folder: Path, hidden: int = 16) -> Path:
    """Write model, rows and YAML of a run in which all that is random is in use: dropout, shuffling, rationales."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_lm(hidden=hidden).save_pretrained(folder / 'model')
    tiny_tokenizer().save_pretrained(folder / 'model')
    for name, count in (('train', EPOCH * BATCH), ('validation', 30)):
        lines = [json.dumps(_row(index)) for index in range(count)]
        (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    source = {'cache_dir': str(folder / 'cache')}
    config = {
        'run_name': 'tiny',
        'output_dir': 'out',
        'task': {
            'name': 'tiny',
            'prompt': '{text}',
            'id': 'idx',
            'label': 'label',
            'rationale': 'rationale',
            'labels': [{'value': label, 'answer': label} for label in LABELS],
        },
        'max_seq_len': 16,  # cuts the longest rationales
        'model': {
            'pretrained_model_name_or_path': str(folder / 'model'),
            'classifier_dropout': 0.2,
            'lora': {'r': 4, 'lora_alpha': 8, 'lora_dropout': 0.2},
        },
        'train_loader': {'source': str(folder / 'train.jsonl'), **source},
        'eval_loaders': {'validation': {'source': str(folder / 'validation.jsonl'), **source}},
        'optimizer': {'name': 'adamw', 'lr': 3e-3},
        'scheduler': {'name': 'cosine_with_warmup', 't_warmup': '5ba'},
        'algorithms': {
            'auxiliary_reasoning_loss': {'schedule': {'name': 'linear', 'alpha_f': 0.0, 't_max': '0.8dur'}},
            'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0},
        },
        'callbacks': {'drop_reasoning_head': {'output_dir': '${output_dir}/slim'}},
        'loggers': {'file': {'filename': '${output_dir}/log-rank{rank}.txt'}},
        'max_duration': f'{STEPS // EPOCH}ep',
        'global_train_batch_size': BATCH,
        'device_train_microbatch_size': 2,  # by length
        'log_to_console': False,
        'progress_bar': False,
        'save_folder': '${output_dir}/checkpoints',
        'save_interval': '7ba',
        'save_num_checkpoints_to_keep': 3,
        'autoresume': True,
    }
    OmegaConf.save(OmegaConf.create(config), folder / 'tiny.yaml')
    return folder / 'tiny.yaml'


def _row(index: int) -> dict:
    row = triplet(index, 3 + index % 5, 2 + index % 4)
    several = [f'{row["rationale"]} w{extra}' for extra in range(3)]
    return {
        'idx': index,
        'text': f'w{index % 60} w{index // 60} {row["input_text"]}',  # no two are the same
        'label': row['label'],
        'rationale': None if index % 5 == 4 else several,
    }


def launch(yaml: Path, folder: Path, *overrides: str, ranks: int = 1, script: str = 'scripts/train.py', start=Popen):
    """Start a run in a folder, on several ranks by the ``composer`` command, as a process group of its own.

    With ``subprocess.Popen`` to ``start`` it, nothing is forked.
    """
    composer = [str(Path(sys.executable).parent / 'composer'), '-n', str(ranks)]
    command = [*(composer if ranks > 1 else [sys.executable]), str(ROOT / script), str(yaml), *overrides]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive', 'TOKENIZERS_PARALLELISM': 'false'}
    folder.mkdir(exist_ok=True)
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return start(command, cwd=folder, env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """Wait for the end of a run; what it printed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        kill(process)
    return output


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all its ranks."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def wait_for(process: subprocess.Popen, reached, timeout: float = 300) -> bool:
    """Wait until ``reached()``; False where the run ended before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if reached():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError('the run neither came that far nor ended')


def losses(out: Path) -> dict[int, str]:
    """The logged total loss of every step, of all logs of a run; a step that was run twice must be the same."""
    found: dict[int, str] = {}
    for log in sorted(out.glob('log-rank0*.txt')):
        try:
            text = log.read_text()
        except FileNotFoundError:  # a run that goes on has just renamed it
            return losses(out)
        for step, loss in re.findall(r'\[batch=(\d+)\]: loss/train/total: (\S+)', text):
            assert found.setdefault(int(step), loss) == loss, f'step {step}: {found[int(step)]}, then {loss}'
    return found


def outcome(out: Path, checkpoints: Path | None = None) -> dict:
    """All that a run ends with: model and optimizer of its last checkpoint, metrics, counts, exported bytes, losses."""
    newest = max((checkpoints or out / 'checkpoints').glob('ep*.pt'), key=lambda path: int(path.stem.split('-')[1][2:]))
    state = torch.load(newest, weights_only=False)['state']
    summary = json.loads((out / 'summary.json').read_text())
    return {
        'weights': digest([state['model'], state['optimizers'], state['schedulers']]),
        'summary': {key: summary[key] for key in ('metrics', 'rows', 'steps', 'tokens', 'rationales_cut')},
        'export': {path.name: digest(path.read_bytes()) for path in sorted((out / 'slim').iterdir())},
        'losses': losses(out),
    }


def digest(data) -> str:
    """A hash of plain data with tensors and arrays in it, bit for bit."""
    found = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif hasattr(value, 'tobytes'):
            found.update(value.tobytes())
        elif isinstance(value, torch.Tensor):
            found.update(value.detach().cpu().numpy().tobytes())
        else:
            found.update(value if isinstance(value, bytes) else repr(value).encode())

    add(data)
    return found.hexdigest()[:16]


class RowRecorder(TokenCounter):
    """Notes which rows this rank reads in which epoch, and sends itself a SIGTERM in the batch ``stop_at``."""

    stop_at: int | None = None

    def after_dataloader(self, state, logger):
        super().after_dataloader(state, logger)
        with open(f'rows-rank{dist.get_global_rank()}.txt', 'a') as file:
            for ids, last in zip(state.batch['input_ids'].tolist(), state.batch['pool_index'].tolist()):
                print(int(state.timestamp.epoch), *ids[: last + 1], file=file)
        if state.timestamp.batch == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


# Checkpoints hold the state of a callback under the name of its class.
RowRecorder.__qualname__ = TokenCounter.__qualname__


def rows_read(folder: Path) -> dict[int, list[str]]:
    """The rows of each epoch, over all ranks, sorted."""
    lines = [line.split(' ', 1) for log in folder.glob('rows-rank*.txt') for line in log.read_text().splitlines()]
    return {epoch: sorted(row for number, row in lines if int(number) == epoch) for epoch in range(STEPS // EPOCH)}


if __name__ == '__main__':
    dhrd_plugin.training.run.TokenCounter = RowRecorder
    sys.exit(dhrd_plugin.training.run.main())
