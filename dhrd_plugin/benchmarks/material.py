"""What is measured on: real rows with their rationales, and a backbone of as many layers as are asked for."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import dhrd_plugin
from dhrd_plugin.benchmarks.options import Options
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.data.triplets import Triplet, read_triplets
from dhrd_plugin.models.build import build_causal_lm, build_tokenizer
from dhrd_plugin.models.pretrained import resolve

PACKAGE = Path(dhrd_plugin.__file__).parent
SAMPLE = PACKAGE / 'data' / 'sample'


def load_rows(count: int = 0, split: str = 'train') -> tuple[Task, list[Triplet], str]:
    """RTE with its rationales from ``$DHRD_SHARED`` or the folder ``shared`` beside the checkout, else the sample.

    Args:
        count: so many rows; those there are, again and again where they are too few. Default: 0, each once.
        split: train or validation.

    Returns:
        The task, the rows, and the name of where they come from.
    """
    task = load_task('rte')
    real = Path(os.environ.get('DHRD_SHARED', PACKAGE.parent.parent / 'shared')) / 'data'
    folder = real / 'superglue' / 'RTE'
    rationales = real / 'rationales' / f'rte_{split}.jsonl'
    if folder.is_dir():
        # Some rationales may belong to rows that are not here; that is no matter of a benchmark.
        options: Any = {'on_bad': lambda bad: None}
        rows = list(read_triplets(folder, task, rationales if rationales.is_file() else None, split, **options))
        name = f'RTE {split}'
    else:
        rows, name = list(read_triplets(SAMPLE, task, split=split)), f'sample {split}'
    rows = [rows[index % len(rows)] for index in range(count)] if count else rows
    return task, rows, name


def load_backbone(options: Options, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM with its first layers, and its tokenizer.

    Args:
        options: name the model and the number of layers.
        **kwargs: for ``AutoModelForCausalLM``.
    """
    logging.set_verbosity_error()  # of the layers that are left out
    overrides = {'num_hidden_layers': options.layers} if options.layers else {}
    return build_causal_lm(options.model, config_overrides=overrides, **kwargs), build_tokenizer(options.model)


def layers_of(options: Options) -> int:
    """How many layers :func:`load_backbone` gives the backbone."""
    return options.layers or AutoConfig.from_pretrained(resolve(options.model)).num_hidden_layers
