"""The command ``dhrd VERB``, and what all verbs do alike."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from dhrd_plugin import __version__
from dhrd_plugin.errors import RankError, UserError, one_line, tell

# Each verb's module and what it does. A module is imported when its verb is typed: some take seconds.
VERBS = {
    'train': ('training.run', 'train a classifier by a YAML, evaluate and export it'),
    'predict': ('predict', 'classify texts with an export'),
    'evaluate': ('evaluate', 'measure a classifier on rows with labels'),
    'export': ('export.from_checkpoint', 'write the slim classifier that a checkpoint holds'),
    'prepare': ('data.prepare', 'write a data set as shards of triplets'),
    'inspect': ('data.inspect', 'show and check a set of shards'),
    'rationales': ('teacher.run', 'ask a teacher model for the rationales of a data set'),
    'show-batch': ('show_batch', 'print rows as the model sees them'),
    'compare': ('comparison.cells', 'train every arm on every task with every seed, and report'),
}
INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C, 130
LONGEST = 10_000  # characters of a line
# Seconds that rank 0 gets to see and tell what another rank has seen; fewer where it perhaps never will.
GRACE = 60.0
SHORT_GRACE = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd VERB ...``.

    Args:
        argv: the arguments after ``dhrd``. Default: those of the command line.

    Returns:
        The exit status: 0, 2 after a user's mistake, 130 after Ctrl-C, 141 where what is printed is not read to its
        end, or the verb's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog='dhrd', description=_description(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--version', action='version', version=f'dhrd {__version__}')
    parser.add_argument('verb', choices=VERBS, metavar='VERB', help='one of the above; dhrd VERB --help says more')

    def work() -> Any:
        verb = parser.parse_args(arguments[:1]).verb
        return import_module(f'dhrd_plugin.{VERBS[verb][0]}').main(arguments[1:])

    return run(work)


def _description() -> str:
    lines = (f'  {verb:<12}{what}' for verb, (_, what) in VERBS.items())
    return '\n'.join(('Dual-Head Reasoning Distillation.', '', *lines))


def run(work: Callable[[], Any]) -> int:
    """Run a verb; a user's mistake becomes one line on stderr and exit status 2.

    On several ranks the others let rank 0 end first: as soon as one has gone, the ``composer`` command ends all,
    be they about to tell the mistake or not, and shows nothing of those that it ended.

    Args:
        work: parses the arguments and does what they ask for; may return an exit status.

    Returns:
        The exit status.
    """
    rank = int(os.environ.get('RANK', 0))
    try:
        status = work()
        return status if isinstance(status, int) else 0
    except UserError as error:
        alone = isinstance(error, RankError)
        if rank == 0 or alone:
            tell(f'error: {one_line(error, LONGEST)}')
        if rank != 0:
            time.sleep(SHORT_GRACE if alone else GRACE)
            if not alone and os.environ.get('LOCAL_RANK') == '0':  # of another node, which may alone have it
                tell(f'error on rank {rank}: {one_line(error, LONGEST)}')
        return 2
    except BrokenPipeError:  # whoever reads what is printed has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the end of Python prints nothing
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, SystemExit) as error:
        if not is_interrupt(error):
            raise
        if rank == 0:
            way_on = f'; {error}' if isinstance(error, KeyboardInterrupt) and str(error) else ''
            tell(f'interrupted{way_on}')
        return INTERRUPTED


def is_interrupt(error: BaseException) -> bool:
    """Whether this is what Ctrl-C raises: where Composer is imported, it is a ``SystemExit``."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == INTERRUPTED)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, as every other mistake's."""

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`~dhrd_plugin.errors.UserError`."""
        raise UserError(f'{message}; see {self.prog} --help')


def number(kind: type, low: float, high: float = float('inf')) -> Callable[[str], Any]:
    """The ``type`` of an argument that is a number.

    Args:
        kind: ``int`` or ``float``.
        low: the least that is right.
        high: the most. Default: no limit.
    """

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = 'a whole number' if kind is int else 'a number'
            most = '' if high == float('inf') else f' to {high}'
            raise argparse.ArgumentTypeError(f'found {text!r}; expected {what} from {low}{most}')
        return value

    return read
