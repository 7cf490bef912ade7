"""The paper's controls (arXiv:2509.21487, Table 2), and one of ours."""

import random
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from dhrd_plugin.data.triplet import Triplet, rationales_of
from dhrd_plugin.errors import UserError, nearest

Control = Literal['ConsistentReasoningLabel', 'OnlyLabel', 'ShuffleReasoning', 'ShuffleReasoningLabel', 'ShuffleTokens']
CONTROLS = get_args(Control)
PLAIN: Control = 'ConsistentReasoningLabel'  # the triplets as they are


def apply_control(triplets: Iterable[Triplet], control: str, seed: int = 17) -> Iterator[Triplet]:
    """Change triplets as a control of the paper's Table 2, or ours, does.

    - ``ConsistentReasoningLabel``: as they are.
    - ``OnlyLabel``: the sequence is input, ``<ANS>``, answer; the rationale becomes the empty text. A row without one
      stays without, so that the same rows are supervised as in the arm that it controls for.
    - ``ShuffleReasoning``: another row's rationale, the row's own answer.
    - ``ShuffleReasoningLabel``: another row's rationale and that row's answer; the class, which the
      classification head learns, stays.
    - ``ShuffleTokens`` (ours): the row's own rationale, its words in a random order, the same for the same seed
      and id; of several rationales each.

    With ``ShuffleReasoning`` and ``ShuffleReasoningLabel`` a row never meets its own rationale nor one of the same
    text; rows without a rationale take no part, and all rows are held in memory.

    Args:
        triplets: the triplets.
        control: one of ``CONTROLS``.
        seed: of the shuffling. Default: 17.

    Raises:
        UserError: an unknown control, or more than half of the rationales have the same text.
    """
    if control not in CONTROLS:
        raise UserError(f'control: unknown {control!r}; {nearest(control, CONTROLS)}')
    if control == PLAIN:
        yield from triplets
    elif control == 'OnlyLabel':
        for triplet in triplets:
            yield {**triplet, 'rationale': None if triplet['rationale'] is None else ''}
    elif control == 'ShuffleTokens':
        for triplet in triplets:
            yield {**triplet, 'rationale': _shuffle_words(triplet['rationale'], f'{seed} {triplet["id"]}')}
    else:
        rows = list(triplets)
        donors = _donors(rows, seed)
        for index, row in enumerate(rows):
            donor = rows[donors.get(index, index)]
            answer = donor['answer'] if control == 'ShuffleReasoningLabel' else row['answer']
            yield {**row, 'rationale': donor['rationale'], 'answer': answer}


def _shuffle_words(rationale: str | list[str] | None, seed: str) -> str | list[str] | None:
    def shuffled(text: str) -> str:
        words = text.split()
        random.Random(seed).shuffle(words)
        return ' '.join(words)

    if isinstance(rationale, list):
        return [shuffled(text) for text in rationale]
    return None if rationale is None else shuffled(rationale)


def _donors(rows: list[Triplet], seed: int) -> dict[int, int]:
    """For each row with a rationale, the row whose rationale it gets.

    In a random order with equal texts side by side, a shift by the size of the largest group leaves every group.
    """
    groups = _groups(rows)
    order = list(groups)
    random.Random(seed).shuffle(order)
    members: dict[str, list[int]] = {}
    for index in order:
        members.setdefault(groups[index], []).append(index)
    shift = max(map(len, members.values()), default=0)
    if 2 * shift > len(order):
        raise UserError(
            f'cannot shuffle the rationales: {shift} of {len(order)} rows share one text; '
            'not every row can get a text other than its own'
        )
    ring = [index for group in members.values() for index in group]
    return dict(zip(ring, ring[shift:] + ring[:shift], strict=True))


def _groups(rows: list[Triplet]) -> dict[int, str]:
    """A group for each row with a rationale; rows that share a text, even by way of others, share it."""
    parent: dict[str, str] = {}

    def find(text: str) -> str:
        while parent.setdefault(text, text) != text:
            text = parent[text]
        return text

    first: dict[int, str] = {}
    for index, row in enumerate(rows):
        for text in rationales_of(row):
            parent[find(text)] = find(first.setdefault(index, text))
    return {index: find(text) for index, text in first.items()}
