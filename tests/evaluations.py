"""Evaluations of a tiny model by Composer; as a script under ``composer -n 2``, it saves the metrics of each rank."""

import json
import random
import sys
from pathlib import Path

import torch
from composer import Evaluator, Trainer
from composer.utils import dist
from tiny import LABELS, WORDS, tiny_lm, tiny_tokenizer, triplet
from torch import nn
from torch.utils.data import DataLoader

from dhrd_plugin import ComposerDualHeadClassifier, DualHeadNetwork, TripletCollator
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.metrics import build_metrics

BINARY = ('accuracy', 'macro_f1', 'f1a', 'em')
ALL = {'AnswerF1', 'ExactMatch', 'MulticlassAccuracy', 'MulticlassF1Score'}


def random_rows(count, labels, groups):
    draw = random.Random(count)
    return [
        {**triplet(i, 3, None, draw.choice(labels)), 'group': f'question {draw.randrange(groups)}'}
        for i in range(count)
    ]


def multirc_rows(shared):
    """The real labels and questions, an odd number of rows, with texts that take no time to read."""
    task = load_task('multirc')
    rows = list(read_triplets(Path(shared) / 'superglue' / 'MultiRC', task, split='validation'))
    draw = random.Random(0)
    return [{**row, 'input_text': ' '.join(draw.choices(WORDS, k=3))} for row in rows[:-1]]


def cases(shared=None):
    """Rows, label names, metrics and batch size of each case; one rank of two gets no row of ``one row``."""
    two, three = LABELS[:2], LABELS
    found = {
        'binary': (random_rows(31, two, 9), two, BINARY, 4),
        'three classes': (random_rows(29, three, 12), three, ('accuracy', 'macro_f1', 'em'), 4),
        'one row': (random_rows(1, two, 1), two, BINARY, 4),
    }
    if shared:
        found['multirc'] = (multirc_rows(shared), ['False', 'True'], BINARY, 512)
    return found


def classifier(labels, metrics=()):
    network = DualHeadNetwork(tiny_lm(), len(labels))
    torch.manual_seed(1)
    nn.init.normal_(network.classifier.out_proj.weight, std=3.0)
    return ComposerDualHeadClassifier(network, tiny_tokenizer(), labels, build_metrics(metrics, len(labels)))


def predictions(rows, labels):
    """Row by row order, in one batch, without Composer's evaluation."""
    batch = TripletCollator(tiny_tokenizer(), labels, reasoning=False)(rows)
    with torch.inference_mode():
        return classifier(labels).eval().eval_forward(batch).argmax(-1).tolist()


def evaluate(rows, labels, metrics, size):
    """What Composer's evaluation logs under ``metrics/``."""
    collator = TripletCollator(tiny_tokenizer(), labels, reasoning=False, groups=True)
    loader = DataLoader(rows, size, sampler=dist.get_sampler(rows, shuffle=False), collate_fn=collator)
    model = classifier(labels, metrics)
    trainer = Trainer(
        model=model,
        eval_dataloader=Evaluator(label='validation', dataloader=triplet_data_spec(loader)),
        device='cpu',
        progress_bar=False,
    )
    trainer.eval()
    return {name: float(metric.compute()) for name, metric in trainer.state.eval_metrics['validation'].items()}


if __name__ == '__main__':
    torch.set_num_threads(1)
    out, shared = sys.argv[1:]
    found = {name: evaluate(*case) for name, case in cases(shared).items()}
    Path(out, f'rank{dist.get_global_rank()}.json').write_text(json.dumps(found))
