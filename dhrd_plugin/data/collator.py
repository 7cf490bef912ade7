"""From triplets to the batch that the network reads."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dhrd_plugin.data.triplet import BadRow, check_label, check_probabilities, check_text, check_weight, spell
from dhrd_plugin.data.truncate import fit
from dhrd_plugin.errors import UserError
from dhrd_plugin.losses import IGNORE_INDEX
from dhrd_plugin.models.extent import Span
from dhrd_plugin.models.verbalizer import spoken

Layout = Literal['reason_first', 'label_first']
ReasoningTargets = Literal['sequence', 'rationale']
Weights = Literal['both', 'reasoning']
T = TypeVar('T')


@dataclass
class Markers:
    """What stands before the rationale and before the answer: ``[x, <REASON>, r, <ANS>, y]``.

    Attributes:
        reason: text before the rationale; may be empty, and is nothing then.
        answer: text before the verbalised label; may be empty, so that what stands before it predicts the label.
        as_tokens: add both to the vocabulary as one token each; their embeddings must be trained, so not
            with LoRA or a frozen backbone. Default: False, plain text.
    """

    reason: str = '<REASON>'
    answer: str = '<ANS>'
    as_tokens: bool = False

    def add_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Grow the tokenizer's vocabulary where ``as_tokens`` asks for it."""
        if self.as_tokens:
            markers = [marker for marker in (self.reason, self.answer) if marker]
            # False: beside those that it has. transformers 5 has another name for the argument.
            tokenizer.add_special_tokens({'additional_special_tokens': markers}, False)


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it."""

    input_ids: list[int]  # of the input, then of the reasoning where there is any
    input_length: int  # how many of them are input; the last of these is pooled
    labels: list[int]  # aligned with input_ids, -100 where unsupervised; empty without a rationale
    cut: int = 0  # tokens of the rationale (without one, of marker and answer) left out to fit the limits


class TripletCollator:
    """Tokenises triplets and pads them to the longest of the batch.

    Input and reasoning are tokenised separately, so no merge across the boundary can move the pooled
    token. Where a row is longer than ``max_seq_len`` its rationale is cut at the end (or left out
    with its markers and answer), never the pooled input. With ``label_first`` marker and answer are left
    out only where they do not fit themselves.

    Args:
        tokenizer: with a pad token.
        label_names: the K class names, in the order of the logits.
        max_seq_len: longest sequence, in tokens. Default: no limit.
        reasoning_targets: ``'sequence'``, every token after the first (the paper, Eq. 3), or
            ``'rationale'``, only what follows the first marker. Default: ``'sequence'``.
        markers: Default: ``<REASON>`` and ``<ANS>`` as plain text.
        reasoning: ``False`` for evaluation, which never reads a rationale. Default: ``True``.
        padding_side: ``'right'`` or ``'left'``. Default: ``'right'``.
        groups: emit ``group`` too, for exact match by group. Default: ``False``.
        weights: which losses the rows' ``weight`` counts in (ours, not the paper's): ``'both'``, or
            ``'reasoning'``, for a teacher's rating, which says nothing of the label. Default: ``None``,
            neither. A row without a weight has 1. See :func:`~dhrd_plugin.losses.weighted_mean`.
        layout: ``'reason_first'``, ``[x, <REASON>, r, <ANS>, y]`` (the paper), or ``'label_first'``,
            ``[x, <ANS>, y, <REASON>, r]`` (ours). Default: ``'reason_first'``.
        rationale_max_tokens: longest rationale, in tokens, without markers. Default: no limit.
        multi_label: a row's ``label`` is a list of class names, any number of them (ours). Default: ``False``.

    Returns (of a call):
        ``input_ids``, ``attention_mask`` [B, S]; ``pool_index``, ``labels`` [B], of a multi-label task [B, K] zeros
        and ones, fp32; ``spans``, B tuples that say on the host where a row begins, its input and it end, and how
        many tokens are supervised; and only where a row of the batch asks for it ``reasoning_labels`` [B, S], -100
        where unsupervised, and ``rationale_cut`` [B], tokens cut (where the empty rationale does not fit, those of
        marker and answer). Where a row has ``probabilities``, ``label_probabilities`` [B, K], 0 in the other rows;
        such a row may lack a label, which is -100 then. With ``groups`` also ``group`` [B], see
        :func:`group_index`; with ``weights`` also ``reasoning_weight`` and, for both, ``classification_weight``
        [B].

    Raises:
        UserError: an input longer than ``max_seq_len``, an input, rationale or answer that is no text, a label outside
            the set, a row without a group, a weight that is negative, not finite or no number, probabilities that are
            not of the classes.
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
        layout: str = 'reason_first',
        rationale_max_tokens: int | None = None,
        multi_label: bool = False,
    ):
        if reasoning_targets not in get_args(ReasoningTargets):
            raise UserError(
                f'reasoning_targets: found {reasoning_targets!r}; expected one of {get_args(ReasoningTargets)}'
            )
        if weights is not None and weights not in get_args(Weights):
            raise UserError(f'weights: found {weights!r}; expected one of {get_args(Weights)}')
        if layout not in get_args(Layout):
            raise UserError(f'layout: found {layout!r}; expected one of {get_args(Layout)}')
        if rationale_max_tokens is not None and rationale_max_tokens < 1:
            raise UserError(f'rationale_max_tokens: found {rationale_max_tokens}; expected a number of 1 or more')
        if tokenizer.pad_token_id is None:
            raise UserError('tokenizer: has no pad token; set tokenizer.pad_token (its eos token will do)')
        self.tokenizer = tokenizer
        self.class_index = {name: index for index, name in enumerate(label_names)}
        self.max_seq_len = max_seq_len
        self.reasoning_targets = reasoning_targets
        self.markers = markers or Markers()
        self.reasoning = reasoning
        self.padding_side = padding_side
        self.groups = groups
        self.weights = weights
        self.layout = layout
        self.rationale_max_tokens = rationale_max_tokens
        self.multi_label = multi_label

    def __call__(self, triplets: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate a list of triplets; see the class."""
        batch = self.lay_out(self.encode(triplets))
        batch['labels'] = torch.tensor([self.target(triplet) for triplet in triplets])
        told = [] if self.multi_label else [self._probabilities(triplet) for triplet in triplets]
        if any(told):
            names = list(self.class_index)
            batch['label_probabilities'] = torch.tensor(
                [[(row or {}).get(name, 0.0) for name in names] for row in told]
            )
        if self.groups:
            batch['group'] = torch.tensor([_group(triplet) for triplet in triplets])
        if self.weights:
            batch['reasoning_weight'] = torch.tensor([_weight(triplet) for triplet in triplets])
        if self.weights == 'both':
            batch['classification_weight'] = batch['reasoning_weight']
        return batch

    def lay_out(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Pad encoded rows to the longest; returns the batch without what is not in their tokens, such as labels."""
        lengths = [len(row.input_ids) for row in rows]
        starts = [max(lengths) - length if self.padding_side == 'left' else 0 for length in lengths]
        batch: dict[str, Any] = {
            'input_ids': self._pad([row.input_ids for row in rows], self.tokenizer.pad_token_id),
            'attention_mask': self._pad([[1] * length for length in lengths], 0),
            'pool_index': torch.tensor([start + row.input_length - 1 for start, row in zip(starts, rows)]),
            'spans': [_span(start, row) for start, row in zip(starts, rows)],
        }
        if any(row.labels for row in rows):
            labels = [row.labels or [IGNORE_INDEX] * len(row.input_ids) for row in rows]
            batch['reasoning_labels'] = self._pad(labels, IGNORE_INDEX)
        if any(row.cut for row in rows):
            batch['rationale_cut'] = torch.tensor([row.cut for row in rows])
        return batch

    def encode(self, triplets: Sequence[dict[str, Any]]) -> list[Encoded]:
        """Tokenise a list of triplets, without padding."""
        rationales = [t.get('rationale') if self.reasoning else None for t in triplets]
        for index, (triplet, rationale) in enumerate(zip(triplets, rationales)):
            checked(check_text, triplet.get('input_text'), 'input_text', triplet.get('id', index), empty=True)
            if rationale is not None:
                checked(check_text, rationale, 'rationale', triplet.get('id', index), empty=True)
                checked(check_text, _answer(triplet), 'answer', triplet.get('id', index))
        texts = [fit(self.tokenizer, t['input_text'], t.get('cuttable'), self.max_seq_len) for t in triplets]
        inputs: Any = self.tokenizer(texts, verbose=False)['input_ids']
        reasons = self._tokenize_rationales(rationales)
        return list(map(self._encode_row, triplets, inputs, reasons))

    def _tokenize_rationales(self, rationales: list[str | None]) -> list[list[int] | None]:
        """Token ids of each: none for the empty text, the control OnlyLabel, and None where there is no rationale."""
        present = [text and spoken(text, self.tokenizer) for text in rationales if text is not None]
        tokens = iter(self._tokenize(present) if present else ())
        return [None if text is None else next(tokens) for text in rationales]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)['input_ids']  # pyright: ignore

    def _encode_row(self, triplet: dict[str, Any], input_ids: list[int], reason: list[int] | None) -> Encoded:
        where = f'row {triplet["id"]}' if triplet.get('id') else 'a row'
        limit = self.max_seq_len or sys.maxsize
        if not input_ids:
            raise UserError(f'{where}: input_text: found no token in {triplet["input_text"]!r}; expected text')
        if len(input_ids) > limit:
            raise UserError(
                f'{where}: input_text: found {len(input_ids)} tokens; expected at most max_seq_len={limit} '
                '(raise max_seq_len, or name a field of the prompt to cut: truncate in the task)'
            )
        if reason is None:
            return Encoded(input_ids, len(input_ids), [])
        because = self._tokenize([self._spaced(self.markers.reason)])[0] if reason else []
        answer = spoken(_answer(triplet), self.tokenizer)
        marker, label = self._tokenize([self._spaced(self.markers.answer), answer])
        room = limit - len(input_ids) - len(marker) - len(label)  # for the rationale and its marker
        fits = room >= (len(because) + 1 if reason else 0)
        label_first = self.layout == 'label_first'
        if not fits and not (label_first and room >= 0):
            return Encoded(input_ids, len(input_ids), [], cut=len(reason) or len(marker + label))
        kept = reason[: min(room - len(because), self.rationale_max_tokens or limit)] if fits else []
        parts = [marker, label, because if kept else [], kept] if label_first else [because, kept, marker, label]
        ids = sum(parts, input_ids)
        # Nothing predicts the first token: under left padding a pad would stand before it.
        first = 1 if self.reasoning_targets == 'sequence' else len(input_ids) + len(parts[0])
        labels = [IGNORE_INDEX] * first + ids[first:]
        return Encoded(ids, len(input_ids), labels, cut=len(reason) - len(kept))

    def _spaced(self, marker: str) -> str:
        return marker if self.markers.as_tokens or not marker else spoken(marker, self.tokenizer)

    def target(self, triplet: dict[str, Any]) -> int | list[float]:
        """The index of a row's class, -100 where it has probabilities alone; of a multi-label task K zeros and ones.

        Raises:
            UserError: a label outside the set, or of the other kind.
        """
        label = triplet.get('label')
        if self.multi_label:
            return self._classes(label, triplet.get('id', '?'))
        if triplet.get('probabilities') and (label is None or (isinstance(label, str) and not label)):
            return IGNORE_INDEX
        if not isinstance(label, str) or label not in self.class_index:
            found = repr(label) if isinstance(label, str) else spell(label)
            raise UserError(
                f'row {triplet.get("id", "?")}: label: found {found}; expected one of {list(self.class_index)}'
            )
        return self.class_index[label]

    def _classes(self, label: object, row: object) -> list[float]:
        if not isinstance(label, list):
            raise UserError(f'row {row}: label: found {spell(label)}; expected a list of {list(self.class_index)}')
        named = checked(check_label, label, 'label', row, names=self.class_index)
        return [float(name in named) for name in self.class_index]

    def _probabilities(self, triplet: dict[str, Any]) -> dict[str, float] | None:
        value, row = triplet.get('probabilities'), triplet.get('id', '?')
        return checked(check_probabilities, value, 'probabilities', row, names=list(self.class_index))

    def _pad(self, rows: list[list[int]], value: Any) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, value, self.padding_side)


def _answer(triplet: dict[str, Any]) -> Any:
    """The words after ``<ANS>``: the answer, else the class's name; several classes are named by their answer alone."""
    label = triplet.get('label')
    return triplet.get('answer') or (label if isinstance(label, str) else None)


def _span(start: int, row: Encoded) -> Span:
    end, targets = start + len(row.input_ids), len(row.labels) - row.labels.count(IGNORE_INDEX)
    return start, start + row.input_length, end, targets


def group_index(group: str) -> int:
    """A number of 63 bits for a group's name, the same in every process."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], 'big') >> 1


def _group(triplet: dict[str, Any]) -> int:
    if not triplet.get('group'):
        raise UserError(f'row {triplet.get("id", "?")}: group: missing; exact match (em) counts rows by their group')
    return group_index(triplet['group'])


def _weight(triplet: dict[str, Any]) -> float:
    return checked(check_weight, triplet.get('weight'), 'weight', triplet.get('id', '?'))


def checked(check: Callable[..., T], value: Any, field: str, row: object, **options: Any) -> T:
    """What ``check(value, field)`` of :mod:`dhrd_plugin.data.triplet` returns; its error names the row."""
    try:
        return check(value, field, **options)
    except BadRow as error:
        raise error.at(f'row {row}') from None
