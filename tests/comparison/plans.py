"""A comparison of toy size, for tests that read or run one."""

from pathlib import Path

from omegaconf import OmegaConf

from dhrd_plugin.comparison.plan import Comparison, load_comparison

SHORT = {
    'max_duration': '6ba',
    'eval_interval': '6ba',
    'save_folder': None,
    'autoresume': False,
    'algorithms': {'auxiliary_reasoning_loss': {'alpha': 0.5, 'schedule': None}},
}
COMPARISON = {
    'name': 'tiny',
    'base': 'tiny.yaml',
    'output_dir': 'out',
    'tasks': {'tiny': SHORT},
    'arms': {
        'pooled': {'algorithms': {'auxiliary_reasoning_loss': None}},
        'dhrd': {},
        'shuffled': {'train_loader': {'control': 'ShuffleReasoning'}},
    },
    'seeds': [1, 2],
}


def write(folder: Path, **changes) -> Path:
    """Write its YAML beside the one of the training run."""
    path = folder / 'comparison.yaml'
    OmegaConf.save(OmegaConf.create({**COMPARISON, **changes}), path)
    return path


def load(folder: Path, out: Path, **changes) -> Comparison:
    """Write and read it."""
    return load_comparison(write(folder, output_dir=str(out), **changes))
