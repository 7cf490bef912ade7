"""Runs with the gradients compared; ``composer -n 2 gradient_runs.py FOLDER`` saves what rank 0 logged and trained."""

import sys

import torch
from composer.utils import dist
from gradients import fit
from tiny import exact, tiny_classifier, triplets

from dhrd_plugin import AuxiliaryReasoningLoss, GradientComparison

# Each: options of the model, weights of the algorithm.
CASES = {
    'tied': ({'tied': True}, {'alpha': 0.5, 'beta': 2.0}),
    'untied': ({'kind': 'gpt2', 'head': 'linear'}, {'alpha': 0.3}),
    'lora': ({'kind': 'qwen3', 'pooling': 'mean', 'lora': True}, {}),
}


def lopsided():
    """Every second row, all that one of two ranks sees, has no rationale."""
    return [{**row, 'rationale': None} if i % 2 else {**row, 'rationale': 'w1 w2'} for i, row in enumerate(triplets(8))]


def compared(log) -> dict[str, dict[int, float]]:
    """What was logged of the gradients, by name and step."""
    prefix = 'dhrd/grad/'
    return {
        name.removeprefix(prefix): {time.batch.value: float(value) for time, value in log.data[name]}
        for name in log.data
        if name.startswith(prefix)
    }


def run_case(case, microbatch=8, interval='1ba', rows=None, double=True, batches=1, algorithms=(), **options):
    """Train one of the cases; what was logged, the weights, and the log."""
    model_options, weights = CASES[case]
    model = tiny_classifier(**model_options)
    model.network.classifier.dropout.p = options.pop('dropout', 0.0)
    if double:
        exact(model)
    weights = {**weights, **options.pop('weights', {})}
    callbacks = [GradientComparison(interval)] if interval else []
    trainer, log, grads = fit(
        model, [AuxiliaryReasoningLoss(**weights), *algorithms], rows, microbatch, batches, callbacks, **options
    )
    state = {name: value.detach().clone() for name, value in trainer.state.model.state_dict().items()}
    return compared(log), state, grads


if __name__ == '__main__':
    torch.set_num_threads(1)
    found = {case: run_case(case, 2)[0] for case in CASES}
    found['lopsided'] = run_case('untied', 2, rows=lopsided())[0]
    found['weights'] = [run_case('tied', 2, interval, double=False, batches=5)[1] for interval in ('2ba', None)]
    if dist.get_global_rank() == 0:
        torch.save(found, f'{sys.argv[1]}/rank0.pt')
