"""What is measured on: rows with their rationales, and a backbone of as many layers as are asked for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import dhrd_plugin
from benchmarks.options import Options
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.data.triplet import Triplet
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.models.build import build_causal_lm, build_tokenizer
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.pretrained import resolve

SAMPLE = Path(dhrd_plugin.__file__).parent / 'data' / 'sample'


def load_rows(count: int = 0, split: str = 'train') -> tuple[Task, list[Triplet], str]:
    """Load RTE with its rationales from below ``$DHRD_SHARED``, or the packaged sample where there is none.

    Args:
        count: rows, repeated where there are fewer. Default: 0, each row once.
        split: train or validation.

    Returns:
        The task, the rows, and the name of their source.
    """
    task, real = load_task('rte'), Path(os.environ.get('DHRD_SHARED', os.devnull)) / 'data'
    folder, rationales = real / 'superglue' / 'RTE', real / 'rationales' / f'rte_{split}.jsonl'
    if folder.is_dir():
        # The file may hold rationales of rows that are not here; a benchmark need not mind.
        options: Any = {'on_bad': lambda bad: None}
        rows = list(read_triplets(folder, task, rationales if rationales.is_file() else None, split, **options))
        name = f'RTE {split}'
    else:
        rows, name = list(read_triplets(SAMPLE, task, split=split)), f'sample {split}'
    return task, repeat(rows, count) if count else rows, name


def repeat(rows: Sequence[Triplet], count: int) -> list[Triplet]:
    """So many rows, one after the other and again from the first, each with an id of its own."""
    return [{**rows[index % len(rows)], 'id': str(index)} for index in range(count)]


def load_backbone(options: Options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal LM with its first layers, and its tokenizer."""
    logging.set_verbosity_error()  # of the layers that are left out
    overrides = {'num_hidden_layers': options.layers} if options.layers else {}
    return build_causal_lm(options.model, config_overrides=overrides), build_tokenizer(options.model)


def build_classifier(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, head: str = 'mlp'
) -> ComposerDualHeadClassifier:
    """Build the model that is trained, its classification head randomly initialised, each time alike."""
    torch.manual_seed(0)
    network = DualHeadNetwork(lm, len(task.label_names), head)
    return ComposerDualHeadClassifier(network, tokenizer, task.label_names)


def layers_of(options: Options) -> int:
    """How many layers :func:`load_backbone` gives the backbone."""
    return options.layers or AutoConfig.from_pretrained(resolve(options.model)).num_hidden_layers


def describe(options: Options, **more: Any) -> dict[str, Any]:
    """The settings of a report: the model, its layers, and ``more``."""
    return {'model': options.model, 'layers': layers_of(options), **more}
