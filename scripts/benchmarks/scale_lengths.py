"""Cost against the length of the rationales: a step of both heads with the same inputs."""

from itertools import cycle

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.measure import ratios
from benchmarks.power import growth_rows
from benchmarks.steps import Bench, Rows, ThroughComposer, runs_unpadded
from benchmarks.table import Table, make_row
from benchmarks.train import take_turns
from dhrd_plugin.data.collator import Markers
from dhrd_plugin.errors import UserError

LENGTHS = (0, 32, 64, 128, 256, 512)  # tokens of a rationale


def length_rows(bench: Bench, rows: Rows, repetitions: int) -> Table:
    """Measure the time of a step of both heads, with the same inputs and longer and longer rationales."""
    sets = {f'rationale of {length} tokens': resized(bench, rows, length) for length in LENGTHS}
    tokens = {name: sum(len(row.input_ids) for row in bench.encode(some)) for name, some in sets.items()}
    free = runs_unpadded(bench) and not torch.cuda.is_available()  # as training does it
    works = {name: ThroughComposer(bench, some, len(rows), free) for name, some in sets.items()}
    seconds = take_turns(works, repetitions)
    each = {name: [1000 * spent / tokens[name] for spent in values] for name, values in seconds.items()}
    expected = (
        'below 1, as the optimizer costs the same at any length; above it once attention, which grows as 2, shows'
    )
    table = growth_rows(f'step of {len(rows)} rows', 's', seconds, 'real tokens', list(tokens.values()), expected)
    first = next(iter(each))
    return table + [
        make_row(
            f'a real token of it, {name}',
            values,
            'ms',
            ratios(values, each[first]),
            first,
            note=f'{tokens[name]:,} real tokens',
        )
        for name, values in each.items()
    ]


def resized(bench: Bench, rows: Rows, length: int) -> Rows:
    """Give the rows rationales of exactly so many tokens, of their own words.

    Raises:
        UserError: the tokenizer joins words, so that no text has exactly so many tokens.
    """
    texts = [row['rationale'] or row['input_text'] for row in rows]
    found = [{**row, 'rationale': _words(bench.tokenizer, text, length)} for row, text in zip(rows, texts)]
    for row, none in zip(bench.encode(found), bench.encode([{**row, 'rationale': ''} for row in rows])):
        opening = len(row.input_ids) - len(none.input_ids) - length
        if opening != (_tokens(bench.tokenizer, f' {Markers().reason}') if length else 0):
            raise UserError(f'{type(bench.tokenizer).__name__}: cannot make a rationale of {length} tokens')
    return found


def _words(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> str:
    """Repeat the words of a text, leaving out those too long for what is left."""
    sizes = {word: _tokens(tokenizer, f' {word}') for word in text.split()}
    if min(sizes.values()) > 1:
        raise UserError(f'{type(tokenizer).__name__}: found no word of one token in {text!r}')
    chosen, left = [], length
    for word in cycle(text.split()):
        if not left:
            return ' '.join(chosen)
        if sizes[word] <= left:
            chosen.append(word)
            left -= sizes[word]
    raise AssertionError


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)['input_ids'])  # pyright: ignore[reportArgumentType]
