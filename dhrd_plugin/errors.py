"""The one exception that means "the user can mend this", and the hint that its message ends with."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a file or a row, told in one line.

    The message names the file, key or row, what was found, and what would be right. The command
    line prints it without a traceback and exits with status 2.
    """


class RankError(UserError):
    """A mistake that perhaps one rank alone sees, such as a damaged shard: the one that does tells it."""


def nearest(name: object, names: Iterable[object], otherwise: str = 'expected one of') -> str:
    """``did you mean ...?``, or ``otherwise`` and all the names, to end a message with."""
    known = [str(item) for item in names]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f'did you mean {close[0]!r}?' if close else f'{otherwise} {", ".join(known)}'
