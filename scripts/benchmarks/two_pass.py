"""The common way to train with rationales: a pass over the input, and one over input and rationale.

Both passes are padded to a fixed length; the second is that of ``AutoModelForCausalLM`` itself, with the logits of
every position. The loss is that of Eq. 4, a mean for each row, so that it can be compared with ours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dhrd_plugin.data.collator import Encoded
from dhrd_plugin.losses import IGNORE_INDEX

MAX_LENGTH = 512

Batch = dict[str, Tensor]


def collate(rows: Sequence[Encoded], classes: Sequence[int], pad: int, length: int = MAX_LENGTH) -> Batch:
    """Make the tensors of both passes, each row padded to ``length``.

    Args:
        rows: with their rationales.
        classes: class indices of the rows.
        pad: the token to pad with.
        length: tokens of every row. Default: 512.

    Returns:
        ``inputs`` and ``sequences`` [B, length], each with its mask; ``targets`` [B, length]; ``last`` and
        ``labels`` [B].
    """
    inputs = [row.input_ids[: row.input_length] for row in rows]
    sequences = [row.input_ids for row in rows]
    return {
        'inputs': _pad(inputs, pad, length),
        'inputs_mask': _pad([[1] * len(ids) for ids in inputs], 0, length),
        'last': torch.tensor([len(ids) - 1 for ids in inputs]),
        'sequences': _pad(sequences, pad, length),
        'sequences_mask': _pad([[1] * len(ids) for ids in sequences], 0, length),
        'targets': _pad([row.labels for row in rows], IGNORE_INDEX, length),
        'labels': torch.tensor(classes),
    }


def _pad(rows: Sequence[list[int]], value: int, length: int) -> Tensor:
    return torch.tensor([ids + [value] * (length - len(ids)) for ids in rows])


def loss(lm: PreTrainedModel, classifier: nn.Module, batch: Batch) -> Tensor:
    """Classification plus reasoning loss of a batch, a mean over the rows.

    Args:
        lm: runs both passes.
        classifier: the head, on the last input token's state [B, H].
        batch: see :func:`collate`.
    """
    hidden = lm.base_model(batch['inputs'], attention_mask=batch['inputs_mask'], use_cache=False)[0]
    pooled = hidden[torch.arange(len(hidden)), batch['last']]
    classification = F.cross_entropy(classifier(pooled), batch['labels'])
    logits = lm(batch['sequences'], attention_mask=batch['sequences_mask'], use_cache=False).logits
    targets = batch['targets'][:, 1:]
    losses = F.cross_entropy(  # in fp32, also where autocast has the logits narrower
        logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction='none'
    )  # [B, length - 1]
    reasoning = (losses.sum(1) / (targets != IGNORE_INDEX).sum(1)).mean()
    return classification + reasoning
