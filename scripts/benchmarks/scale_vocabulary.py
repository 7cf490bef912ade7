"""Cost against the vocabulary: the reasoning loss by itself, forward and backward, ours and with full logits."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import MIB, interleave, peak_memory
from benchmarks.power import growth_rows
from benchmarks.table import Table
from dhrd_plugin.losses import chunked_lm_loss, weighted_mean

VOCABULARIES = tuple(2**power for power in range(13, 18))  # words
SUPERVISED = 1024  # tokens
FULL = 'full logits'
ALONE = 'fp32 logits alone'


def vocabulary_rows(hidden_size: int, device: torch.device, repetitions: int) -> Table:
    """Measure time against that of full logits, and memory beyond the gradients against the logits alone."""
    sizes = {f'{words:,} words': words for words in VOCABULARIES}
    works = {
        f'{way}, {name}': LossWork(loss, words, hidden_size, device)
        for way, loss in {'ours': ours, FULL: full}.items()
        for name, words in sizes.items()
    }
    seconds = interleave(works, repetitions)
    extras = {name: [extra_memory(work)] for name, work in works.items()}  # the same each time
    logits = {name: [4 * SUPERVISED * words / MIB] for name, words in sizes.items()}

    def pick(costs: Mapping[str, Sequence[float]], way: str) -> dict[str, Sequence[float]]:
        return {name: costs[f'{way}, {name}'] for name in sizes}

    grow = partial(growth_rows, over='words', sizes=VOCABULARIES)
    what = f'reasoning loss of {SUPERVISED:,} tokens'
    return [
        *grow(what, 's', pick(seconds, 'ours'), expected='1', against=(FULL, pick(seconds, FULL))),
        *grow(
            f'{what}, extra peak memory',
            'MiB',
            pick(extras, 'ours'),
            expected='1 where a chunk of logits is more than the states',
            against=(ALONE, logits),
        ),
        *grow(f'{FULL}, {what}, extra peak memory', 'MiB', pick(extras, FULL), expected='1', against=(ALONE, logits)),
    ]


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # states [1, T + 1, H], labels [1, T + 1], weight [V, H]


def ours(states: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Our loss: a chunk of logits at a time."""
    return weighted_mean(chunked_lm_loss(states, labels, weight))


def full(states: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The plain loss: all logits at once."""
    return F.cross_entropy(F.linear(states[0, :-1], weight), labels[0, 1:])


class LossWork:
    """Run a loss of random states and labels, forward and backward, at each call.

    Attributes:
        inputs: states ``[1, T + 1, H]`` and the LM head's weight ``[V, H]``, whose gradients are taken.
    """

    def __init__(self, loss: Loss, words: int, hidden_size: int, device: torch.device):
        draw = torch.Generator(device).manual_seed(0)
        states = torch.randn(1, SUPERVISED + 1, hidden_size, device=device, generator=draw)
        weight = torch.randn(words, hidden_size, device=device, generator=draw) / hidden_size**0.5
        self.loss = loss
        self.inputs = [states.requires_grad_(), weight.requires_grad_()]
        self.labels = torch.randint(words, (1, SUPERVISED + 1), device=device, generator=draw)

    def __call__(self) -> tuple[Tensor, ...]:
        """Return the gradients."""
        states, weight = self.inputs
        with torch.autocast(states.device.type, torch.bfloat16, enabled=states.is_cuda):
            loss = self.loss(states, self.labels, weight)
        return torch.autograd.grad(loss, self.inputs)


def extra_memory(work: LossWork) -> float:
    """MiB at the peak beyond the gradients, which every way has; at least a page, the system's unit."""
    gradients = sum(tensor.nbytes for tensor in work.inputs)
    return max(peak_memory(work) - gradients, os.sysconf('SC_PAGE_SIZE')) / MIB
