"""One training run of a tiny model; as a script under ``composer -n 2``, it saves each rank's gradients."""

import sys

import torch
from composer import Algorithm, Callback, Trainer
from composer.loggers import InMemoryLogger
from composer.optim import DecoupledAdamW
from composer.utils import dist
from tiny import LABELS, exact, tiny_classifier, tiny_tokenizer, triplets
from torch.utils.data import DataLoader

from dhrd_plugin import AuxiliaryReasoningLoss, TripletCollator
from dhrd_plugin.data.data_spec import triplet_data_spec

# Each: options of the model, weights of the algorithm, whether in fp64.
CASES = {
    'tied fp32': ({'tied': True}, {}, False),
    'untied fp64': ({'kind': 'gpt2', 'head': 'linear'}, {'alpha': 0.5, 'beta': 2.0}, True),
    'lora mean': ({'kind': 'qwen3', 'pooling': 'mean', 'lora': True}, {}, False),
    'alpha 0': ({}, {'alpha': 0.0}, False),
    'weights both': ({'head': 'linear'}, {'alpha': 0.5, 'beta': 2.0}, False),
    'weights reasoning fp64': ({'kind': 'gpt2'}, {}, True),
    'soft labels fp64': ({}, {'alpha': 0.5}, True),
}
# Where the rows' weights count in those cases; they have one in all cases.
WEIGHTED = {'weights both': 'both', 'weights reasoning fp64': 'reasoning'}
WEIGHTS = [0.0, 0.25, 1.0, 3.0, 0.5, 2.0, 0.75, 1.25]


def weighted_triplets():
    return [{**row, 'weight': weight} for row, weight in zip(triplets(8), WEIGHTS)]


def rows_of(case):
    """The rows of a case; of those with soft labels, all that have none of their own fall to one of two ranks."""
    if 'soft' not in case:
        return weighted_triplets()
    rows = [{**row, 'probabilities': dict(zip(LABELS, (0.125, 0.75, 0.125)))} for row in weighted_triplets()]
    for index in (1, 3, 5):
        rows[index] |= {'label': '', 'answer': '', 'rationale': None}
    return [{**row, 'probabilities': None} if index in (2, 4, 7) else row for index, row in enumerate(rows)]


class GrabGradients(Callback):
    """Keeps the gradients of each step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def after_train_batch(self, state, logger):
        named = getattr(state.model, 'module', state.model).named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def fit(
    model,
    algorithms: list[Algorithm],
    rows=None,
    microbatch=8,
    batches=2,
    callbacks=(),
    by_length=False,
    reasoning=True,
    weights=None,
    **options,
):
    """Train on batches of 8 rows over all ranks; the trainer, its log and the gradients of each step."""
    rows = rows or weighted_triplets()
    collator = TripletCollator(tiny_tokenizer(), LABELS, reasoning=reasoning, weights=weights)
    size = 8 // dist.get_world_size()
    loader = DataLoader(rows, size, sampler=dist.get_sampler(rows, shuffle=False), collate_fn=collator)
    grab, log = GrabGradients(), InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=triplet_data_spec(loader, by_length),
        optimizers=DecoupledAdamW(model.parameters(), lr=0.01, weight_decay=0.001),
        max_duration=f'{batches}ba',
        device='cpu',
        device_train_microbatch_size=microbatch,
        algorithms=algorithms,
        callbacks=[grab, *callbacks],
        loggers=[log],
        progress_bar=False,
        **options,
    )
    trainer.fit()
    return trainer, log, grab.steps


def case_gradients(name: str, microbatch: int, by_length=False):
    """Gradients of two steps of one of the cases."""
    options, weights, double = CASES[name]
    model = tiny_classifier(**options)
    if double:
        exact(model)
    algorithm = AuxiliaryReasoningLoss(**weights)
    options = {'microbatch': microbatch, 'by_length': by_length, 'weights': WEIGHTED.get(name)}
    return fit(model, [algorithm], rows_of(name), **options)[2]


if __name__ == '__main__':
    found = {name: case_gradients(name, 2) for name in CASES}
    torch.save(found, f'{sys.argv[1]}/rank{dist.get_global_rank()}.pt')
