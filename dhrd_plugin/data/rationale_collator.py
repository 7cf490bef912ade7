"""From the rows of a pipeline that already exists, with a rationale, to what the network reads."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from dhrd_plugin.data.collator import Markers, TripletCollator, checked
from dhrd_plugin.data.triplet import BETWEEN, NO_CLASS, check_text, check_weight, spell
from dhrd_plugin.errors import UserError, one_line

LABELS = ('labels', 'label')  # of the rows, never of the tokens


class RationaleCollator(TripletCollator):
    """Puts each row's rationale and answer behind the batch that a pipeline's own collator makes.

    Their collator never sees the rationale. Where no row of a batch has one, its batch is returned
    as it is; else ``[x, <REASON>, r, <ANS>, y]`` is laid out as :class:`TripletCollator` does, x
    being the row's real tokens in their batch. That is for a model with a reasoning head: a stock classifier pools
    the last token, and would read the answer there.

    Args:
        tokenizer: with a pad token.
        label_names: the K class names, in the order of the labels, or a mapping of every label to its
            name: the answers; where the batch's ``labels`` are zeros and ones [B, K], those of the ones. Default: none,
            each row with a rationale has an ``answer_key``.
        collate_fn: the pipeline's own: rows to ``input_ids``, ``attention_mask`` [B, S] and what else it
            wants. Default: transformers' ``DataCollatorWithPadding``, for tokenised rows.
        max_seq_len: longest sequence, in tokens; cuts the rationale. Default: the tokenizer's
            ``model_max_length``.
        reasoning_targets: as in :class:`TripletCollator`.
        markers: as in :class:`TripletCollator`.
        rationale_key: the row's field, a text; a row without it, or with ``None`` or NaN (pandas' missing)
            there, has no rationale. Default: ``'rationale'``.
        answer_key: the row's field for the verbalised label, where it differs from the class name.
            Default: ``'answer'``.
        layout: as in :class:`TripletCollator`.
        rationale_max_tokens: as in :class:`TripletCollator`.
        reasoning: ``False`` for evaluation and for a model without a reasoning head, such as a pooled baseline: their
            batch, whatever rationales the rows have. Default: ``True``.

    Returns (of a call):
        Their batch, ``input_ids`` and ``attention_mask`` longer, with ``pool_index`` [B],
        ``reasoning_labels`` [B, S], -100 where unsupervised, and, where any was cut,
        ``rationale_cut`` [B]. Whole numbers [B, S], such as token types, go along; ``labels`` and fractions
        never do, whatever their shape.

    Raises:
        UserError: a rationale or an answer that is no text; a row that has no answer and whose entry in the batch's
            ``labels`` is no class's index or name; a batch without ``attention_mask``; an input longer than
            ``max_seq_len``; a weight in the batch that is negative or not finite.

    Example:
        >>> DataLoader(rows, batch_size=8, collate_fn=RationaleCollator(tokenizer, ['no', 'yes']))
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str] | Mapping[int, str] | None = None,
        collate_fn: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None,
        max_seq_len: int | None = None,
        reasoning_targets: str = 'sequence',
        markers: Markers | None = None,
        rationale_key: str = 'rationale',
        answer_key: str = 'answer',
        layout: str = 'reason_first',
        rationale_max_tokens: int | None = None,
        reasoning: bool = True,
    ):
        self.label_names = _check_names(label_names)
        super().__init__(
            tokenizer,
            self.label_names,
            max_seq_len or tokenizer.model_max_length,
            reasoning_targets,
            markers,
            reasoning,
            padding_side=tokenizer.padding_side,
            layout=layout,
            rationale_max_tokens=rationale_max_tokens,
        )
        self.collate_fn = collate_fn or DataCollatorWithPadding(tokenizer)
        self.rationale_key = rationale_key
        self.answer_key = answer_key

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:  # pyright: ignore
        """Collate a list of rows; see the class."""
        ours = (self.rationale_key, self.answer_key)
        batch = self.collate_fn([{key: value for key, value in row.items() if key not in ours} for row in rows])
        _check_weights(rows, batch)
        rationales = [self._rationale(row, index) if self.reasoning else None for index, row in enumerate(rows)]
        if all(rationale is None for rationale in rationales):
            return batch
        for key in ('input_ids', 'attention_mask'):
            if key not in batch:
                raise UserError(f'{key}: the batch holds only {sorted(batch)}; expected a collate_fn that tokenises')
        return {**batch, **self._lengthen(rows, rationales, batch)}

    def _rationale(self, row: Mapping[str, Any], index: int) -> str | None:
        value = row.get(self.rationale_key)
        if _is_missing(value):
            return None
        return checked(check_text, value, self.rationale_key, row.get('id', index), empty=True)

    def _lengthen(
        self, rows: Sequence[Mapping[str, Any]], rationales: list[str | None], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        real = batch['attention_mask'].bool()
        triplets = [
            {
                'id': str(row.get('id', index)),
                'input_text': '',
                'answer': None if rationale is None else self._answer(row, batch, index),
            }
            for index, (row, rationale) in enumerate(zip(rows, rationales))
        ]
        inputs = [ids[mask].tolist() for ids, mask in zip(batch['input_ids'], real)]
        encoded = list(map(self._encode_row, triplets, inputs, self._tokenize_rationales(rationales)))
        laid_out = self.lay_out(encoded)
        for key, value in batch.items():
            if key not in (*laid_out, *LABELS) and _is_per_token(value, real):
                # Token types and the like: their values over the input, 0 over the rest.
                longer = [
                    torch.cat([values[mask], values.new_zeros(len(row.input_ids) - row.input_length)])
                    for values, mask, row in zip(value, real, encoded)
                ]
                laid_out[key] = pad_sequence(longer, True, 0, self.padding_side)
        return laid_out

    def _answer(self, row: Mapping[str, Any], batch: Mapping[str, Any], index: int) -> str:
        """The verbalised label of a row: its own, or the name of its class."""
        where, answer = row.get('id', index), row.get(self.answer_key)
        if not _is_missing(answer):
            return checked(check_text, answer, self.answer_key, where)
        several = _several(batch.get('labels'), index, len(self.label_names))
        if several is not None:
            return BETWEEN.join(name for name, has in zip(self.label_names, several) if has) or NO_CLASS
        label = _label(batch['labels'], index, where) if 'labels' in batch else -1
        if label in self.class_index:
            return str(label)
        if not (isinstance(label, int) and 0 <= label < len(self.label_names)):
            raise UserError(
                f'row {where}: {self.answer_key}: missing, and label_names has no name for label {label}; '
                f'expected RationaleCollator(label_names=...) or a field {self.answer_key!r}'
            )
        return self.label_names[label]


def _check_names(names: Sequence[str] | Mapping[int, str] | None) -> list[str]:
    """The class names in the order of the labels."""
    if isinstance(names, Mapping):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f'label_names: found the labels {list(names)}; expected a name for each of 0, 1, 2 ...')
        names = [names[label] for label in range(len(names))]
    found = [] if names is None else [names] if isinstance(names, str) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in found):
        raise UserError(f'label_names: found {names!r}; expected a list of texts')
    if len(set(found)) < len(found):
        raise UserError(f'label_names: found {found}; expected each name once')
    return found


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, Real) and value != value)


def _is_per_token(value: object, real: Tensor) -> bool:
    """Whether the batch holds a whole number for each token, and behind the tokens the same for all."""
    if not isinstance(value, Tensor) or value.shape != real.shape or value.is_floating_point():
        return False
    return value[~real].unique().numel() <= 1


def _several(labels: Any, index: int, count: int) -> list[float] | None:
    """A row's zeros and ones in a batch of several labels, ``labels`` [B, K]; None where it is of another kind."""
    if not isinstance(labels, Tensor) or labels.shape[1:] != (count,) or not count:
        return None
    row = labels[index].tolist()
    return row if set(row) <= {0, 1} else None


def _label(labels: Any, index: int, where: object) -> int | str:
    """The class of a row in the batch: its index, or its name."""
    try:
        label = labels[index]
    except (TypeError, LookupError):
        raise UserError(f'row {where}: labels: found {one_line(labels, 80)}; expected one label a row') from None
    label = label.tolist() if hasattr(label, 'tolist') else label
    if isinstance(label, bool):
        return int(label)
    if not isinstance(label, int | str):
        raise UserError(
            f'row {where}: labels: found {spell(label)}; expected the index of one class, or a zero or '
            'one for each: numbers to predict have no name'
        )
    return label


def _check_weights(rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> None:
    for key in ('reasoning_weight', 'classification_weight'):
        for index, value in enumerate(torch.as_tensor(batch[key]).tolist() if key in batch else ()):
            checked(check_weight, value, key, rows[index].get('id', index))
