"""The one rule by which an input is cut to fit: in training, in evaluation and in prediction."""

from collections.abc import Sequence
from typing import Any

from dhrd_plugin.errors import UserError


def fit(tokenizer: Any, text: str, cuttable: Sequence[int] | None, limit: int | None) -> str:
    """The text, with the end of one field cut off where it has more tokens than it may.

    What stands before and behind the field, the frame of the prompt, stays; at least one token of the field does too.

    Args:
        tokenizer: a fast one, which knows where in the text a token stands.
        text: the input text.
        cuttable: ``[start, end]``, the characters of the field; None: nothing may be cut.
        limit: the most tokens, ``max_seq_len``; None: as many as there are.

    Returns:
        The text; still too long where nothing may be cut, or the frame alone fills the limit.
    """
    if cuttable is None or limit is None:
        return text
    whole, (start, end) = text, cuttable
    while True:
        encoded = _encode(tokenizer, text)
        excess = len(encoded['input_ids']) - limit
        if excess <= 0:
            return text
        inside = [begin for begin, stop in encoded['offset_mapping'] if start <= begin < stop <= end]
        if excess >= len(inside) or inside[-excess] == start:  # of one character, all of whose tokens begin there
            return whole
        text, end = text[: inside[-excess]] + text[end:], inside[-excess]


def _encode(tokenizer: Any, text: str) -> Any:
    if not getattr(tokenizer, 'is_fast', False):
        raise UserError('truncate: the tokenizer does not say where its tokens stand; expected a fast one')
    return tokenizer(text, return_offsets_mapping=True, verbose=False)
