"""A task of the tiny triplets, and configs of runs from plain settings."""

from pathlib import Path
from typing import Any

from composer.utils import dist
from omegaconf import OmegaConf
from tiny import LABELS, tiny_classifier, tiny_tokenizer

from dhrd_plugin import load_config
from dhrd_plugin.export.write import write_slim
from dhrd_plugin.training.config import Config

TASK = {
    'name': 'tiny',
    'prompt': '{input_text}',
    'id': 'id',
    'labels': [{'value': label, 'answer': label} for label in LABELS],
}
# A random model of the packaged one's kind and tokenizer, of 4 % of its size.
RANDOM = [
    'model.pretrained=false',
    'model.config_overrides={num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, '
    'num_key_value_heads: 1, head_dim: 16}',
]


def config_from(settings: dict[str, Any], out: Path, *overrides: str) -> Config:
    """Settings written as a YAML into ``out``, each rank its own, and read again as the command reads them."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f'run{dist.get_global_rank()}.yaml'
    path.write_text(OmegaConf.to_yaml(settings))
    return load_config(path, overrides)


def export_of(task: dict[str, Any], out: Path) -> Path:
    """The export of a model that holds the task."""
    model = tiny_classifier(head='linear')
    model.info['task'] = task
    return write_slim(model.get_metadata(), model.network.state_dict(), out)


def write_readable_run(folder: Path, task: dict[str, Any], loader: dict[str, Any]) -> Path:
    """The YAML of a run whose rows are to be looked at; of the model there is the tokenizer alone."""
    tiny_tokenizer().save_pretrained(folder / 'model')
    settings = {
        'run_name': 'odd',
        'output_dir': '/nowhere',
        'task': task,
        'max_seq_len': 64,
        'model': {'pretrained_model_name_or_path': str(folder / 'model')},
        'train_loader': loader,
        'eval_loaders': {},
        'optimizer': {'name': 'adamw', 'lr': 0.001},
        'max_duration': '1ba',
        'global_train_batch_size': 2,
    }
    (folder / 'run.yaml').write_text(OmegaConf.to_yaml(settings))
    return folder / 'run.yaml'
