"""What the reasoning loss holds beyond the pooled arm, where both run the backbone over the same tokens."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import MIB, peak_memory
from benchmarks.steps import BATCH, Bench, step
from benchmarks.table import Table, make_row
from dhrd_plugin.losses import combine_losses

TOKENS = 4096  # supervised


def reasoning_memory_rows(bench: Bench, tokens: int = TOKENS, repetitions: int = 3) -> Table:
    """Measure the extra peak memory of the reasoning loss, ours and with full logits, against those logits alone.

    Args:
        bench: a few layers will do: what the backbone holds, all ways hold.
        tokens: supervised ones, in rows of one length, which are all input; the last one is pooled. Default: 4096.
        repetitions: of each measurement. Default: 3.
    """
    words = bench.network.lm_head.out_features
    batch = whole_input(tokens // BATCH + 1, words, bench.device)
    losses = {'pooled': pooled_loss, 'ours': both_losses, 'full': full_losses}
    peaks: dict[str, list[int]] = {name: [] for name in losses}
    for number in range(-1, repetitions):
        for name, loss_of in losses.items():
            bench.optimizer.zero_grad()
            peak = peak_memory(partial(step, bench, [batch], partial(loss_of, bench)))
            if number >= 0:
                peaks[name].append(peak)
    extra = {name: [a - b for a, b in zip(peaks[name], peaks['pooled'], strict=True)] for name in ('ours', 'full')}
    logits = 4 * tokens * words
    what = f'{tokens:,} tokens x {words:,} words'
    rows = []
    for name, bar in {'full': None, 'ours': 0.25}.items():
        values, ratio = [value / MIB for value in extra[name]], [value / logits for value in extra[name]]
        label = f'reasoning loss, extra peak memory, {what}'
        label = f'full logits, {label}' if name == 'full' else label
        rows.append(make_row(label, values, 'MiB', ratio, 'fp32 logits alone', at_most=bar))
    return rows


def whole_input(length: int, words: int, device: torch.device) -> dict[str, Tensor]:
    """Make a random batch whose rows are input to their end, and supervised from their second token on.

    Args:
        length: tokens of a row.
        words: of the vocabulary.
        device: of the tensors.
    """
    ids = torch.randint(words, (BATCH, length), generator=torch.Generator().manual_seed(0)).to(device)
    return {
        'input_ids': ids,
        'attention_mask': torch.ones_like(ids),
        'pool_index': torch.full((BATCH,), length - 1, device=device),
        'reasoning_labels': ids,
        'labels': torch.zeros(BATCH, dtype=torch.long, device=device),
    }


def _run(bench: Bench, part: dict[str, Tensor], reasoning: bool) -> tuple[Tensor, Tensor | None]:
    inputs = {key: value for key, value in part.items() if key != 'labels'}
    output = bench.network(**inputs, return_reasoning_loss=reasoning)
    return F.cross_entropy(output.logits, part['labels']), output.reasoning_loss


def pooled_loss(bench: Bench, part: dict[str, Tensor]) -> Tensor:
    """The pooled arm's loss of a batch."""
    return _run(bench, part, reasoning=False)[0]


def both_losses(bench: Bench, part: dict[str, Tensor]) -> Tensor:
    """The loss of both heads."""
    classification, reasoning = _run(bench, part, reasoning=True)
    return combine_losses(classification, reasoning)  # pyright: ignore[reportArgumentType]


def full_losses(bench: Bench, part: dict[str, Tensor]) -> Tensor:
    """The same with the logits of all positions at once."""
    lm, ids = bench.network.causal_lm, part['input_ids']
    hidden = lm.base_model(ids, attention_mask=part['attention_mask'], use_cache=False)[0]
    logits = lm.get_output_embeddings()(hidden[:, :-1])  # pyright: ignore[reportCallIssue]
    classification = F.cross_entropy(bench.network.classifier(hidden[:, -1]), part['labels'])
    return classification + F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
