"""From the rows of a pipeline that already exists, with a rationale, to what the network reads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from dhrd_plugin.data.collation import Markers, TripletCollator
from dhrd_plugin.errors import UserError


class RationaleCollator(TripletCollator):
    """Puts each row's rationale and answer behind the batch that a pipeline's own collator makes.

    Their collator never sees the rationale. Where no row of a batch has one, its batch is returned
    as it is; else ``[x, <REASON>, r, <ANS>, y]`` is laid out as :class:`TripletCollator` does, x
    being the row's real tokens in their batch.

    Args:
        tokenizer: with a pad token.
        label_names: the K class names, in the order of the labels: the answers. Default: none, each
            row with a rationale has an ``answer_key``.
        collate_fn: the pipeline's own: rows to ``input_ids``, ``attention_mask`` [B, S] and what else it
            wants. Default: transformers' ``DataCollatorWithPadding``, for tokenised rows.
        max_seq_len: longest sequence, in tokens; cuts the rationale. Default: the tokenizer's
            ``model_max_length``.
        reasoning_targets: as in :class:`TripletCollator`.
        markers: as in :class:`TripletCollator`.
        rationale_key: the row's field; a row without it, or with ``None`` there, has no rationale.
        answer_key: the row's field for the verbalised label, where it differs from the class name.

    Returns (of a call):
        Their batch, ``input_ids`` and ``attention_mask`` longer, with ``pool_index`` [B],
        ``reasoning_labels`` [B, S], -100 where unsupervised, and, where any was cut,
        ``rationale_cut`` [B].

    Raises:
        UserError: a row without an answer, a batch without ``attention_mask``, an input longer than
            ``max_seq_len``.

    Example:
        >>> DataLoader(rows, batch_size=8, collate_fn=RationaleCollator(tokenizer, ['no', 'yes']))
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str] | None = None,
        collate_fn: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None,
        max_seq_len: int | None = None,
        reasoning_targets: str = 'sequence',
        markers: Markers | None = None,
        rationale_key: str = 'rationale',
        answer_key: str = 'answer',
    ):
        super().__init__(
            tokenizer,
            label_names or (),
            max_seq_len or tokenizer.model_max_length,
            reasoning_targets,
            markers,
            padding_side=tokenizer.padding_side,
        )
        self.label_names = list(label_names or ())
        self.collate_fn = collate_fn or DataCollatorWithPadding(tokenizer)
        self.rationale_key = rationale_key
        self.answer_key = answer_key

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:  # pyright: ignore
        """Collate a list of rows."""
        ours = (self.rationale_key, self.answer_key)
        batch = self.collate_fn([{key: value for key, value in row.items() if key not in ours} for row in rows])
        if all(row.get(self.rationale_key) is None for row in rows):
            return batch
        for key in ('input_ids', 'attention_mask'):
            if key not in batch:
                raise UserError(f'{key}: the batch holds only {sorted(batch)}; expected a collate_fn that tokenises')
        return {**batch, **self._lengthen(rows, batch)}

    def _lengthen(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        real = batch['attention_mask'].bool()
        rationales = [row.get(self.rationale_key) for row in rows]
        tokens = iter(self._tokenize([f' {text}' if text else '' for text in rationales if text is not None]))
        encoded = [
            self._encode_row(
                self._triplet(row, batch, index),
                batch['input_ids'][index][real[index]].tolist(),
                None if rationales[index] is None else next(tokens),
            )
            for index, row in enumerate(rows)
        ]
        laid_out = self.lay_out(encoded)
        length = laid_out['input_ids'].shape[1]
        for key, value in batch.items():
            # Token types and the like: their values over the input, 0 over the rest.
            if key not in laid_out and isinstance(value, Tensor) and value.shape == real.shape:
                longer = [
                    values[mask].tolist() + [0] * (len(row.input_ids) - row.input_length)
                    for values, mask, row in zip(value, real, encoded)
                ]
                laid_out[key] = self._pad(longer, length, 0)
        return laid_out

    def _triplet(self, row: Mapping[str, Any], batch: Mapping[str, Any], index: int) -> dict[str, Any]:
        """What :class:`TripletCollator` wants to know of a row besides its tokens."""
        where = row.get('id', index)
        answer = row.get(self.answer_key)
        if answer is None and row.get(self.rationale_key) is not None:
            label = int(batch['labels'][index]) if 'labels' in batch else -1
            if not 0 <= label < len(self.label_names):
                raise UserError(
                    f'row {where}: {self.answer_key}: missing, and label_names has no name for label {label}; '
                    f'expected RationaleCollator(label_names=...) or a field {self.answer_key!r}'
                )
            answer = self.label_names[label]
        return {'id': str(where), 'input_text': '', 'answer': answer}
