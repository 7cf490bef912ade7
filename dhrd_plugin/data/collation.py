"""From triplets to the batch that the network reads."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import DataSpec
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dhrd_plugin.data.tasks import BadRow, check_weight
from dhrd_plugin.errors import UserError
from dhrd_plugin.losses import IGNORE_INDEX

REASONING_TARGETS = ('sequence', 'rationale')
WEIGHTS = ('both', 'reasoning')


@dataclass
class Markers:
    """What stands before the rationale and before the answer: ``[x, <REASON>, r, <ANS>, y]``.

    Attributes:
        reason: text before the rationale.
        answer: text before the verbalised label.
        as_tokens: add both to the vocabulary as one token each; their embeddings are to be trained, so not
            with LoRA or a frozen backbone. Default: plain text.
    """

    reason: str = '<REASON>'
    answer: str = '<ANS>'
    as_tokens: bool = False

    def add_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Grow the vocabulary where ``as_tokens`` asks for it."""
        if self.as_tokens:
            tokenizer.add_special_tokens(
                {'additional_special_tokens': [self.reason, self.answer]},
                replace_additional_special_tokens=False,
            )


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it.

    Attributes:
        input_ids: token ids of the input, then of the reasoning where there is any.
        input_length: how many of them are input; the last of these is pooled.
        labels: aligned with ``input_ids``, -100 where unsupervised; empty without a rationale.
        cut: tokens of the rationale left out to fit ``max_seq_len``.
    """

    input_ids: list[int]
    input_length: int
    labels: list[int]
    cut: int = 0


class TripletCollator:
    """Tokenises triplets and pads them to the longest of the batch.

    Input and reasoning are tokenised apart, so no merge across the boundary can move the pooled
    token. Where a row is longer than ``max_seq_len`` its rationale is cut at the end (or left out
    with its markers and answer), never the pooled input.

    Args:
        tokenizer: with a pad token.
        label_names: the K class names, in the order of the logits.
        max_seq_len: longest sequence, in tokens. Default: no limit.
        reasoning_targets: ``'sequence'``, every token after the first (the paper, Eq. 3), or
            ``'rationale'``, only what follows ``<REASON>``.
        markers: default ``<REASON>`` and ``<ANS>`` as plain text.
        reasoning: ``False`` for evaluation, which never reads a rationale.
        padding_side: ``'right'`` (default) or ``'left'``.
        groups: emit ``group`` too, for exact match by group. Default: ``False``.
        weights: which losses the rows' ``weight`` counts in (ours, not the paper's): ``'both'``, or
            ``'reasoning'``, for a teacher's rating, which says nothing of the label. Default: ``None``,
            neither. A row without a weight has 1. See :func:`~dhrd_plugin.losses.weighted_mean`.

    Returns (of a call):
        ``input_ids``, ``attention_mask`` [B, S]; ``pool_index``, ``labels`` [B]; and only where a
        row of the batch asks for it ``reasoning_labels`` [B, S], -100 where unsupervised, and
        ``rationale_cut`` [B], tokens cut. With ``groups`` also ``group`` [B], see :func:`group_index`;
        with ``weights`` also ``reasoning_weight`` and, for both, ``classification_weight`` [B].

    Raises:
        UserError: an input longer than ``max_seq_len``, a label outside the set, a row without a group,
            a weight that is negative or no number.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str],
        max_seq_len: int | None = None,
        reasoning_targets: str = 'sequence',
        markers: Markers | None = None,
        reasoning: bool = True,
        padding_side: str = 'right',
        groups: bool = False,
        weights: str | None = None,
    ):
        if reasoning_targets not in REASONING_TARGETS:
            raise UserError(f'reasoning_targets: found {reasoning_targets!r}; expected one of {REASONING_TARGETS}')
        if weights is not None and weights not in WEIGHTS:
            raise UserError(f'weights: found {weights!r}; expected one of {WEIGHTS}')
        if tokenizer.pad_token_id is None:
            raise UserError('tokenizer: it has no pad token; set tokenizer.pad_token (its eos token will do)')
        self.tokenizer = tokenizer
        self.class_index = {name: index for index, name in enumerate(label_names)}
        self.max_seq_len = max_seq_len
        self.reasoning_targets = reasoning_targets
        self.markers = markers or Markers()
        self.reasoning = reasoning
        self.padding_side = padding_side
        self.groups = groups
        self.weights = weights

    def __call__(self, triplets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate a list of triplets."""
        batch = self.lay_out(self.encode(triplets))
        batch['labels'] = torch.tensor([self._class(triplet) for triplet in triplets])
        if self.groups:
            batch['group'] = torch.tensor([_group(triplet) for triplet in triplets])
        if self.weights:
            batch['reasoning_weight'] = torch.tensor([_weight(triplet) for triplet in triplets])
        if self.weights == 'both':
            batch['classification_weight'] = batch['reasoning_weight']
        return batch

    def lay_out(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad rows to the longest: what a batch holds of their tokens."""
        length = max(len(row.input_ids) for row in rows)
        batch = {
            'input_ids': self._pad([row.input_ids for row in rows], length, self.tokenizer.pad_token_id),
            'attention_mask': self._pad([[1] * len(row.input_ids) for row in rows], length, 0),
            'pool_index': torch.tensor([self._offset(row, length) + row.input_length - 1 for row in rows]),
        }
        if any(row.labels for row in rows):
            batch['reasoning_labels'] = self._pad(
                [row.labels or [IGNORE_INDEX] * len(row.input_ids) for row in rows], length, IGNORE_INDEX
            )
        if any(row.cut for row in rows):
            batch['rationale_cut'] = torch.tensor([row.cut for row in rows])
        return batch

    def encode(self, triplets: Sequence[dict[str, Any]]) -> list[Encoded]:
        """Tokenise, without padding."""
        inputs = self.tokenizer([t['input_text'] for t in triplets], verbose=False)['input_ids']
        reasons = [self._reason(t) for t in triplets]
        present = [text for text in reasons if text is not None]
        tokens = iter(self._tokenize(present))
        return [
            self._encode_row(triplet, ids, None if reason is None else next(tokens))  # pyright: ignore
            for triplet, ids, reason in zip(triplets, inputs, reasons)  # pyright: ignore
        ]

    def _reason(self, triplet: dict[str, Any]) -> str | None:
        rationale = triplet.get('rationale') if self.reasoning else None
        return None if rationale is None else rationale and f' {rationale}'

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # An empty rationale is the OnlyLabel control: no tokens.
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)['input_ids']  # pyright: ignore

    def _encode_row(self, triplet: dict[str, Any], input_ids: list[int], reason: list[int] | None) -> Encoded:
        where = f'row {triplet["id"]}' if triplet.get('id') else 'a row'
        limit = self.max_seq_len or sys.maxsize
        if not input_ids:
            raise UserError(f'{where}: input_text: found no token in {triplet["input_text"]!r}; expected text')
        if len(input_ids) > limit:
            raise UserError(
                f'{where}: input_text: found {len(input_ids)} tokens; expected at most max_seq_len={limit} '
                '(the pooled input is never cut: raise max_seq_len or shorten the text)'
            )
        if reason is None:
            return Encoded(input_ids, len(input_ids), [])
        opening = self._tokenize([self._spaced(self.markers.reason)])[0] if reason else []
        marker, answer = self._tokenize([self._spaced(self.markers.answer), f' {_answer(triplet)}'])
        closing = marker + answer
        room = limit - len(input_ids) - len(opening) - len(closing)
        if room < (1 if reason else 0):
            return Encoded(input_ids, len(input_ids), [], cut=len(reason))
        kept = reason[:room]
        ids = input_ids + opening + kept + closing
        # Nothing predicts the first token: under left padding a pad would stand before it.
        first = 1 if self.reasoning_targets == 'sequence' else len(input_ids) + len(opening)
        labels = [IGNORE_INDEX] * first + ids[first:]
        return Encoded(ids, len(input_ids), labels, cut=len(reason) - len(kept))

    def _spaced(self, marker: str) -> str:
        return marker if self.markers.as_tokens else f' {marker}'

    def _class(self, triplet: dict[str, Any]) -> int:
        label = triplet['label']
        if label not in self.class_index:
            raise UserError(
                f'row {triplet.get("id", "?")}: label: found {label!r}; expected one of {list(self.class_index)}'
            )
        return self.class_index[label]

    def _offset(self, row: Encoded, length: int) -> int:
        return length - len(row.input_ids) if self.padding_side == 'left' else 0

    def _pad(self, rows: list[list[int]], length: int, value: Any) -> Tensor:
        padded = torch.full((len(rows), length), value)
        for index, row in enumerate(rows):
            start = length - len(row) if self.padding_side == 'left' else 0
            padded[index, start : start + len(row)] = torch.tensor(row)
        return padded


def group_index(group: str) -> int:
    """A number of 63 bits for a group's name, the same in every process."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], 'big') >> 1


def _group(triplet: dict[str, Any]) -> int:
    if not triplet.get('group'):
        raise UserError(f'row {triplet.get("id", "?")}: group: missing; exact match (em) counts rows by their group')
    return group_index(triplet['group'])


def _weight(triplet: dict[str, Any]) -> float:
    try:
        return check_weight(triplet.get('weight'), 'weight')
    except BadRow as error:
        raise error.at(f'row {triplet.get("id", "?")}') from None


def _answer(triplet: dict[str, Any]) -> str:
    return triplet.get('answer') or triplet['label']


def triplet_data_spec(dataloader: DataLoader, by_length: bool = False) -> DataSpec:
    """Tell Composer how many samples and real tokens a batch of triplets holds, and how to cut it.

    ``loss_generating`` tokens are declared as samples: both losses are means over samples, so with
    ``accumulate_train_batch_on_tokens`` (llm-foundry's default) the gradient stays the same.

    Args:
        dataloader: yields batches of :class:`TripletCollator`.
        by_length: cut a training batch into microbatches of like length, which pads less and
            changes no gradient. Never for evaluation, where Composer drops a batch's last rows.
    """
    return DataSpec(
        dataloader,
        get_num_samples_in_batch=lambda batch: len(batch['labels']),
        get_num_tokens_in_batch=_count_tokens,  # pyright: ignore[reportArgumentType]
        split_batch=split_by_length if by_length else split,
    )


def _count_tokens(batch: dict[str, Tensor]) -> dict[str, int]:
    return {'total': int(batch['attention_mask'].sum()), 'loss_generating': len(batch['labels'])}


def split(batch: dict[str, Tensor], microbatch_size: float) -> list[dict[str, Tensor]]:
    """Cut a batch into microbatches of ``microbatch_size`` rows, in order."""
    size = int(microbatch_size)
    return [
        {key: value[start : start + size] for key, value in batch.items()}
        for start in range(0, len(batch['labels']), size)
    ]


def split_by_length(batch: dict[str, Tensor], microbatch_size: float) -> list[dict[str, Tensor]]:
    """As :func:`split`, the rows sorted by their number of real tokens."""
    order = batch['attention_mask'].sum(1).argsort(stable=True)
    return split({key: value[order] for key, value in batch.items()}, microbatch_size)
