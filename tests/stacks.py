"""Exports and checkpoints of one set of versions, opened and gone on from with another.

    python tests/stacks.py .venv/bin/python .venv-current/bin/python

Each of the two makes the exports of ``export/test_write.py`` and a run that stops in the middle. Then each loads what
either has made: the exports where this package cannot be imported, the checkpoint by ``dhrd export`` and by
``autoresume``.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE / 'export'))
TEXTS = [' '.join(f'w{i + n}' for n in range(1 + i % 5)) for i in range(12)]


def run(python: str, step: str, *arguments: object) -> str:
    """A step of this file with one set of versions; the last line that it prints."""
    env = {**os.environ, 'PYTHONPATH': str(HERE.parent), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    command = [python, __file__, step, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def make(folder: Path) -> str:
    """Exports and their logits, a whole run, and one that is killed at its second checkpoint."""
    import torch
    from runs import finish, kill, launch, wait_for, write_run
    from test_write import MODELS, train_and_export

    for name, options in MODELS.items():
        model = train_and_export(options, folder / name / 'slim')
        with torch.no_grad():
            found = model.network(**model.tokenizer(TEXTS, padding=True, return_tensors='pt')).logits
        torch.save(found, folder / name / 'logits.pt')
    yaml = write_run(folder / 'run')
    finish(launch(yaml, folder / 'straight'))
    stopped = launch(yaml, folder / 'stopped')
    assert wait_for(stopped, lambda: any((folder / 'stopped').glob('out/checkpoints/ep*-ba14-*')))
    kill(stopped)
    return versions()


def versions() -> str:
    """Those that matter here."""
    import torch
    import transformers

    return f'torch {torch.__version__}, transformers {transformers.__version__}'


def load(folder: Path) -> str:
    """How far the exports' logits lie from those where they were made; without this package."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    furthest = {}
    for slim in sorted(folder.glob('*/slim')):
        trust = (slim / 'slim.py').exists()
        tokenizer = AutoTokenizer.from_pretrained(slim, trust_remote_code=trust)
        model = AutoModelForSequenceClassification.from_pretrained(slim, trust_remote_code=trust).eval()
        with torch.no_grad():
            found = model(**tokenizer(TEXTS, padding=True, return_tensors='pt')).logits
        expected = torch.load(slim.parent / 'logits.pt', weights_only=True)
        furthest[slim.parent.name] = float((found - expected).abs().max())
    assert not [name for name in sys.modules if name.startswith('dhrd_plugin')]
    name = max(furthest, key=lambda name: furthest[name])
    return f'{len(furthest)} exports: logits within {furthest[name]:.1e} ({name})'


def export(folder: Path, scratch: Path) -> str:
    """The export of the whole run's last checkpoint, against the one that the run wrote."""
    from safetensors.torch import load_file

    from dhrd_plugin.export.from_checkpoint import export_checkpoint

    newest = (folder / 'straight/out/checkpoints/latest-rank0.pt').resolve()
    export_checkpoint(str(newest), scratch / 'slim')
    found, expected = (
        load_file(slim / 'model.safetensors') for slim in (scratch / 'slim', folder / 'straight/out/slim')
    )
    far = max(float((found[name] - value).abs().max()) for name, value in expected.items())
    return f'a checkpoint: weights within {far:.1e}'


def go_on(folder: Path, scratch: Path) -> str:
    """The stopped run, started again; its losses against those of the whole run."""
    from runs import finish, launch, losses

    again = shutil.copytree(folder / 'stopped', scratch / 'again', symlinks=True)
    output = finish(launch(folder / 'run' / 'tiny.yaml', again))
    if not (again / 'out' / 'summary.json').exists():
        return f'does not go on: {next((line for line in output.splitlines() if "rror: " in line), output[-300:])}'
    found, expected = losses(again / 'out'), losses(folder / 'straight' / 'out')
    far = max(abs(float(found[step]) - float(loss)) for step, loss in expected.items())
    return f'goes on: {len(found)} losses within {far:.1e}'


def main() -> None:
    """Each with each."""
    if sys.argv[1] in STEPS:
        print(STEPS[sys.argv[1]](*map(Path, sys.argv[2:])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = {python: Path(scratch) / f'made{number}' for number, python in enumerate(sys.argv[1:])}
        names = {python: run(python, 'make', folder) for python, folder in folders.items()}
        for maker, folder in folders.items():
            for python in folders:
                found = [run(python, 'load', folder)]
                for step in ('export', 'go_on'):
                    with tempfile.TemporaryDirectory(dir=scratch) as place:
                        found.append(run(python, step, folder, place))
                print(f'{names[maker]} -> {names[python]}:', *found, sep='\n    ', flush=True)


STEPS = {step.__name__: step for step in (make, load, export, go_on)}

if __name__ == '__main__':
    main()
