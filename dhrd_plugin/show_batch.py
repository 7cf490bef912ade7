"""Print a few rows as the model sees them: worth a look before a long run."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.data.collator import Encoded
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.triplet import classes_of
from dhrd_plugin.losses import IGNORE_INDEX
from dhrd_plugin.streams.dataset import draw_rationale
from dhrd_plugin.streams.rows import StreamRows
from dhrd_plugin.training.builders import build_collator, build_tokenizer_from, find_streams, reasons
from dhrd_plugin.training.checks import check_limits
from dhrd_plugin.training.config import Config, load_config
from dhrd_plugin.training.labels import find_labels

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


def show(config: Config, count: int, console: Console) -> None:
    """Print the first rows of the training set, in the order in which they are stored."""
    check_limits(config)
    task = find_labels(config, load_task(config.task))
    rows = StreamRows(find_streams('train_loader', config.train_loader, task))
    tokenizer = build_tokenizer_from(config)
    collator = build_collator(config, task, tokenizer, reasoning=reasons(config))
    console.print(LEGEND, style='dim', markup=False)
    for index in range(min(count, len(rows))):
        triplet = rows[index]
        triplet['rationale'] = draw_rationale(
            triplet.get('rationale'), triplet['id'], 0, config.seed
        )  # as epoch 0 does
        (row,) = collator.encode([triplet])
        supervised = sum(label != IGNORE_INDEX for label in row.labels)
        console.print(
            f'\nrow {triplet["id"]}: label {", ".join(classes_of(triplet)) or "(none)"}; {len(row.input_ids)} tokens, '
            f'{row.input_length} of them input, number {row.input_length - 1} pooled, '
            f'{supervised} supervised, {row.cut} cut from the rationale',
            style='dim',
            markup=False,
        )
        console.print(render_row(row, tokenizer))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog='dhrd show-batch', description=__doc__)
    parser.add_argument('yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value')
    parser.add_argument('--rows', type=number(int, 1), default=4, help='how many; default: %(default)s')
    return parser.parse_intermixed_args(argv)  # overrides may stand on either side of --rows


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd show-batch YAML [key=value ...] [--rows N]``."""

    def work() -> None:
        args = parse_args(argv)
        show(load_config(args.yaml, args.overrides), args.rows, Console(highlight=False))

    return run(work)
