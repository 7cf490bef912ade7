"""A linear head that begins as the LM's own choice among the answers, and trains on from there (ours).

A verbalizer is what prompt-based classification calls the words of the classes (arXiv:2001.07676).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dhrd_plugin.errors import UserError


def spoken(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer, or another text, as it goes on from the text before it: after a space."""
    return text if _puts_space(tokenizer) else f' {text}'


@lru_cache
def _puts_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer itself puts a space before a text, as Llama 2's does; a second is a token of its own."""
    return ''.join(tokenizer.tokenize('a')).startswith('\u2581')


@torch.no_grad()
def begin_as_answers(
    score: Any, lm_head: Any, tokenizer: PreTrainedTokenizerBase | None, answers: Sequence[str], where: str = 'answers'
) -> None:
    """Make the rows of a linear head those that the LM head has for the classes' words.

    Each row is the mean over its answer's tokens, which are those that :class:`~dhrd_plugin.TripletCollator` puts
    behind ``<ANS>``. Over the last input token the head's logits are then the LM's own.

    Args:
        score: its ``weight`` [K, H] is written; a bias becomes 0.
        lm_head: with a ``weight`` [V, H]: an LM head, or the input embedding that it is tied to.
        tokenizer: of the LM.
        answers: the words of the K classes, in the order of the logits.
        where: what an error begins with. Default: ``'answers'``.

    Raises:
        UserError: no tokenizer; not K answers; one without a token, or whose tokens have a bias in the LM head,
            for which a head without one has no place; two of the same row.
    """
    if tokenizer is None:
        raise UserError(f'{where}: found without a tokenizer; expected a model that has its own')
    if isinstance(answers, str) or len(answers) != len(score.weight):
        raise UserError(f'{where}: found {answers!r}; expected one for each of {len(score.weight)} classes')
    tokens: Any = tokenizer([spoken(answer, tokenizer) for answer in answers], add_special_tokens=False, verbose=False)
    rows, bias = [], getattr(lm_head, 'bias', None)
    for answer, ids in zip(answers, tokens['input_ids']):
        if not ids or max(ids) >= len(lm_head.weight):
            raise UserError(f'{where}: {answer!r} is the tokens {ids}; expected tokens of the LM head')
        if bias is not None and bias[ids].any():
            raise UserError(
                f'{where}: the LM head adds a bias to {answer!r}; expected an LM head without, or head=linear'
            )
        # In fp64 the mean is the same in any order of the tokens.
        rows.append(lm_head.weight[ids].cpu().double().mean(0).to(score.weight))
    for (one, row), (other, same) in combinations(zip(answers, rows), 2):
        if torch.equal(row, same):
            raise UserError(
                f'{where}: {one!r} and {other!r} are the same row of the LM head; expected words that differ'
            )
    score.weight.copy_(torch.stack(rows))
    if getattr(score, 'bias', None) is not None:
        score.bias.zero_()
