"""A stock Composer pipeline around a tiny classifier, as a user has it before the package is there.

As a script under ``composer -n 2``, it saves each rank's gradients with the algorithm added.
"""

import sys
from pathlib import Path

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from composer.utils import dist
from gradients import GrabGradients
from tiny import LABELS, tiny_lm, tiny_tokenizer, triplets
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from dhrd_plugin import AuxiliaryReasoningLoss, RationaleCollator

SHAPES = ('llama', 'gpt2', 'qwen2', 'qwen3', 'mistral')


def stock_classifier(kind='llama', folder=None, peft_config=None, **config):
    """A ``HuggingFaceModel`` around a ``...ForSequenceClassification`` over the backbone of ``tiny_lm``.

    Its config says that an LM head is tied to the input embedding, so that it may be one.
    The causal LM it comes from is saved to ``folder`` where one is given.
    """
    lm = tiny_lm(kind)
    if folder is not None:
        lm.save_pretrained(folder)
    names = {'id2label': dict(enumerate(LABELS)), 'label2id': {name: i for i, name in enumerate(LABELS)}}
    lm.config.update({**names, 'tie_word_embeddings': True, **config})
    torch.manual_seed(1)
    inner = AutoModelForSequenceClassification.from_config(lm.config)
    inner.base_model.load_state_dict(lm.base_model.state_dict())
    metrics = [MulticlassAccuracy(num_classes=len(LABELS), average='micro')]
    return HuggingFaceModel(inner, tiny_tokenizer(), metrics=metrics, use_logits=True, peft_config=peft_config)


def tokenised(rows=None, rationales=True):
    """Rows as ``datasets.map`` leaves them, with or without their rationale."""
    tokenizer = tiny_tokenizer()
    return [
        {**tokenizer(row['input_text']), 'label': LABELS.index(row['label'])}
        | ({'rationale': row['rationale']} if rationales else {})
        for row in rows or triplets(8)
    ]


def collator(side='right', **options):
    """Ours around theirs."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return RationaleCollator(tokenizer, LABELS, **options)


def build(
    model, algorithms=(), rows=None, collate_fn=None, batches=2, microbatch=8, optimizer=None, callbacks=(), **options
):
    """A trainer on batches of 8 rows over all ranks, its log and the gradients to come."""
    rows = tokenised(rationales=False) if rows is None else rows
    size = 8 // dist.get_world_size()
    loader = DataLoader(
        rows,
        size,
        sampler=dist.get_sampler(rows, shuffle=False),
        collate_fn=collate_fn or DataCollatorWithPadding(tiny_tokenizer()),
    )
    grab, log = GrabGradients(), InMemoryLogger()
    options = {'max_duration': f'{batches}ba', **options}
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=optimizer or torch.optim.AdamW(model.parameters(), lr=0.01),
        device='cpu',
        device_train_microbatch_size=microbatch,
        algorithms=list(algorithms),
        callbacks=[grab, *callbacks],
        loggers=[log],
        progress_bar=False,
        **options,
    )
    return trainer, log, grab.steps


def fit(model, algorithms=(), *args, **options):
    """Train; the trainer, its log and the gradients of each step."""
    trainer, log, steps = build(model, algorithms, *args, **options)
    trainer.fit()
    return trainer, log, steps


def lopsided():
    """Every second row, all that one of two ranks sees, has no rationale."""
    return [{**row, 'rationale': None} if i % 2 else row for i, row in enumerate(tokenised())]


# Each: weights of the algorithm, whether the reasoning head is the checkpoint's own, the rows.
CASES = {
    'tied': ({'alpha': 0.5, 'beta': 2.0}, False, tokenised),
    'untied, one rank without a rationale': ({}, True, lopsided),
    'untied, alpha 0': ({'alpha': 0.0}, True, tokenised),
}


def case_gradients(name, folder, microbatch=2):
    """Gradients of two steps of one of the cases."""
    weights, untied, rows = CASES[name]
    model = stock_classifier(folder=None)
    algorithm = AuxiliaryReasoningLoss(**weights, pretrained_model_name_or_path=str(folder) if untied else None)
    return fit(model, [algorithm], rows(), collator(), microbatch=microbatch)[2]


if __name__ == '__main__':
    found = {name: case_gradients(name, Path(sys.argv[1]) / 'lm') for name in CASES}
    torch.save(found, f'{sys.argv[1]}/rank{dist.get_global_rank()}.pt')
