"""Print a few rows as the model sees them: worth a look before a long run."""

import argparse
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dhrd_plugin.cli import run
from dhrd_plugin.config import load_config
from dhrd_plugin.data.collation import IGNORE_INDEX, Encoded
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.training import as_plain, build_collator, build_tokenizer_from, check_limits, find_streams, open_rows

LEGEND = 'plain: read only; [pooled]; underlined: supervised as a target of the reasoning head'


def render_row(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> Text:
    """One row's text: the pooled token in brackets and bold, the supervised tokens underlined."""
    text = Text()
    for position, token in enumerate(row.input_ids):
        piece = tokenizer.decode([token])
        supervised = bool(row.labels) and row.labels[position] != IGNORE_INDEX
        if position == row.input_length - 1:
            text.append(f'[{piece}]', 'bold reverse underline' if supervised else 'bold reverse')
        else:
            text.append(piece, 'underline' if supervised else '')
    return text


def show(config: DictConfig, count: int, console: Console) -> None:
    """Print the first rows of the training set, in the order in which they are stored."""
    check_limits(config)
    task = load_task(as_plain(config.task))
    rows = open_rows(find_streams('train_loader', config.train_loader, task))
    tokenizer = build_tokenizer_from(config)
    collator = build_collator(config, task, tokenizer)
    console.print(LEGEND, style='dim', markup=False)
    for index in range(min(count, len(rows))):
        triplet = rows[index]
        (row,) = collator.encode([triplet])
        supervised = sum(label != IGNORE_INDEX for label in row.labels)
        console.print(
            f'\nrow {triplet["id"]}: label {triplet["label"]}; {len(row.input_ids)} tokens, '
            f'{row.input_length} of them input, number {row.input_length - 1} pooled, '
            f'{supervised} supervised, {row.cut} cut from the rationale',
            style='dim',
            markup=False,
        )
        console.print(render_row(row, tokenizer))


def main(argv: Sequence[str] | None = None) -> int:
    """``show_batch.py YAML [key=value ...]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value')
    parser.add_argument('--rows', type=int, default=4)
    args = parser.parse_intermixed_args(argv)  # overrides may stand on either side of --rows
    return run(lambda: show(load_config(args.yaml, args.overrides), args.rows, Console(highlight=False)))
