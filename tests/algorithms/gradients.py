"""One training run of a tiny model; as a script under ``composer -n 2``, it saves each rank's gradients."""

import sys
from pathlib import Path

import torch
from composer import Algorithm, Callback, Trainer
from composer.loggers import InMemoryLogger
from composer.optim import DecoupledAdamW
from composer.utils import dist
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import LABELS, exact, tiny_classifier, tiny_tokenizer, triplets

from dhrd_plugin import AuxiliaryReasoningLoss, TripletCollator
from dhrd_plugin.data.collation import triplet_data_spec

# Each: options of the model, weights of the algorithm, whether in fp64.
CASES = {
    'tied fp32': ({'tied': True}, {}, False),
    'untied fp64': ({'kind': 'gpt2', 'head': 'linear'}, {'alpha': 0.5, 'beta': 2.0}, True),
    'lora mean': ({'kind': 'qwen3', 'pooling': 'mean', 'lora': True}, {}, False),
    'alpha 0': ({}, {'alpha': 0.0}, False),
    'weights both': ({'head': 'linear'}, {'alpha': 0.5, 'beta': 2.0}, False),
    'weights reasoning fp64': ({'kind': 'gpt2'}, {}, True),
}
# Where the rows' weights count in those cases; they have one in all cases.
WEIGHTED = {'weights both': 'both', 'weights reasoning fp64': 'reasoning'}
WEIGHTS = [0.0, 0.25, 1.0, 3.0, 0.5, 2.0, 0.75, 1.25]


def weighted_triplets():
    return [{**row, 'weight': weight} for row, weight in zip(triplets(8), WEIGHTS)]


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
    return fit(model, [algorithm], microbatch=microbatch, by_length=by_length, weights=WEIGHTED.get(name))[2]


if __name__ == '__main__':
    found = {name: case_gradients(name, 2) for name in CASES}
    torch.save(found, f'{sys.argv[1]}/rank{dist.get_global_rank()}.pt')
