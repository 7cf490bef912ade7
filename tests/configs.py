"""A task of the tiny triplets, and configs of runs from plain settings."""

from pathlib import Path
from typing import Any

from composer.utils import dist
from omegaconf import DictConfig, OmegaConf
from tiny import LABELS

from dhrd_plugin import load_config

TASK = {
    'name': 'tiny',
    'prompt': '{input_text}',
    'id': 'id',
    'labels': [{'value': label, 'answer': label} for label in LABELS],
}


def config_from(settings: dict[str, Any], out: Path, *overrides: str) -> DictConfig:
    """Settings written as a YAML into ``out``, each rank its own, and read again as the command reads them."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f'run{dist.get_global_rank()}.yaml'
    path.write_text(OmegaConf.to_yaml(settings))
    return load_config(path, overrides)
