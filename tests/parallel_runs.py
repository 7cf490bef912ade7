"""Runs of tiny models by ``train``; ``composer [-n 2] parallel_runs.py ROOT LAYOUT/CASE ...`` keeps their series."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from composer.utils import dist
from configs import TASK, config_from
from tiny import tiny_lm, tiny_tokenizer, triplet

from dhrd_plugin import train
from dhrd_plugin.training.fsdp import average_gradients

LAYOUTS = {
    'one': {},
    'ddp': {},
    'fsdp2': {'fsdp_config': {'version': 2, 'state_dict_type': 'sharded'}},
    'fsdp2-full': {'fsdp_config': {'version': 2, 'state_dict_type': 'full', 'activation_checkpointing': True}},
    'fsdp2-summed': {'fsdp_config': {'version': 2}},
}
LORA = {'r': 4, 'lora_alpha': 8, 'lora_dropout': 0.0}
CASES = {
    'tied': ('tied', {}),
    'untied': ('untied', {}),
    'tied-lora': ('tied', {'lora': LORA, 'head': 'verbalizer'}),
    'untied-lora': ('untied', {'lora': LORA, 'pooling': 'mean', 'classifier_norm': True}),
    'frozen': ('untied', {'freeze_backbone': True}),
}
# A backbone in bf16, whose head is in fp32; one process and many ranks round it apart.
HALF = {'half': ('untied', {'pretrained': False, 'config_overrides': {'dtype': 'bfloat16'}})}
STEPS = 20


def write_inputs(root: Path) -> None:
    """Two models, their tokenizer and rows, below ``root``."""
    for name in ('tied', 'untied'):
        tiny_lm(tied=name == 'tied').save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    for name, count in (('train', 64), ('val', 31)):
        rows = [triplet(i, 2 + i % 7, None if i % 5 == 4 else 1 + i % 6) for i in range(count)]
        (root / f'{name}.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))


def steps_of(case: str) -> int:
    """Of a run by the script; in the first twelve of the first one clipping tells no average from a sum."""
    return STEPS if case == 'tied' else 10


def config_of(root: Path, layout: str, case: str, *overrides: str):
    """The YAML of a run, written below ``root`` and read again."""
    backbone, model = {**CASES, **HALF}[case]
    out = root / layout / case
    reasoning = {'alpha': 0.5, 'schedule': {'name': 'linear', 'alpha_i': 1.0, 'alpha_f': 0.5}}
    settings = {
        'run_name': f'{layout}-{case}',
        'output_dir': str(out),
        'task': TASK,
        'max_seq_len': 64,
        'model': {'pretrained_model_name_or_path': str(root / backbone), 'chunk_size': 7, **model},
        'train_loader': {
            'source': str(root / 'train.jsonl'),
            'cache_dir': str(root / 'cache'),
            'layout': 'label_first' if case == 'tied-lora' else 'reason_first',
        },
        'eval_loaders': {'val': {'source': str(root / 'val.jsonl'), 'cache_dir': str(root / 'cache')}},
        'optimizer': {'name': 'decoupled_adamw', 'lr': 3e-3, 'weight_decay': 1e-3},
        'scheduler': {'name': 'linear_with_warmup', 't_warmup': '4ba'},
        'algorithms': {
            'auxiliary_reasoning_loss': None if case == 'frozen' else reasoning,  # which would train nothing
            # Within the range of the gradients' norms: it tells an average from a sum, which Adam does not.
            'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 2.0},
        },
        'callbacks': {'drop_reasoning_head': {'output_dir': str(out / 'slim')}},
        'loggers': {'in_memory': {}},
        'max_duration': f'{STEPS}ba',
        'eval_interval': '10ba',
        'save_folder': str(out / 'checkpoints'),
        'save_overwrite': True,
        'global_train_batch_size': 8,
        'device_train_microbatch_size': 2,
        'log_to_console': False,
        'device': 'cpu',
        **LAYOUTS[layout],
    }
    return config_from(settings, out, *overrides)


def run_case(root: Path, layout: str, case: str, *overrides: str) -> None:
    """Train, and write the series of both losses and the metrics beside the export."""
    trainer = train(config_of(root, layout, case, *overrides))
    (log,) = [destination for destination in trainer.logger.destinations if hasattr(destination, 'data')]
    found = {
        name: [float(value) for _, value in log.data[name]]
        for name in log.data
        if name.startswith(('loss/train', 'metrics/'))
    }
    if dist.get_global_rank() == 0:
        (root / layout / case / 'series.json').write_text(json.dumps(found))
    trainer.close()


if __name__ == '__main__':
    torch.set_num_threads(1)
    root, *runs = sys.argv[1:]
    for run in runs:
        layout, case = run.split('/')
        average = (lambda model: None) if layout == 'fsdp2-summed' else average_gradients
        with patch('dhrd_plugin.training.builders.average_gradients', average):
            run_case(Path(root), layout, case, f'max_duration={steps_of(case)}ba')
