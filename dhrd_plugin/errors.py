"""The exception that means "the user can mend this", and how foreign errors become one line."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dhrd_plugin.redact import without_secrets


class UserError(ValueError):
    """A mistake in a config, a file or a row, told in one line.

    The message names the file, key or row, what was found, and what would be right. The command
    line prints it without a traceback and exits with status 2.
    """


class RankError(UserError):
    """A mistake that only one rank may see, such as a damaged shard: the rank that sees it prints it."""


def tell(line: str) -> None:
    """Print a line on stderr in one write, as ranks and their launcher write there at the same time."""
    sys.stderr.write(f'{line}\n')
    sys.stderr.flush()


def nearest(name: object, names: Iterable[object]) -> str:
    """``did you mean ...?`` of the name nearest to ``name``, or ``expected one of`` and all names, to end a message."""
    known = [str(item) for item in names]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f'did you mean {close[0]!r}?' if close else f'expected one of {", ".join(known)}'


def one_line(text: object, limit: int = 300, kind: bool = False) -> str:
    """An error, or any text, on one line and without secrets.

    Args:
        text: an error, or anything that has a text.
        limit: longest line, in characters; the rest is cut.
        kind: begin with the error's class, and with the code that a storage client gave it.
    """
    line = without_secrets(' '.join(str(text).split()))
    line = line if len(line) <= limit else f'{line[: limit - 1]}…'
    return f'{f"{type(text).__name__} {error_code(text)}".strip()}: {line}' if kind else line


def error_code(error: Any) -> str:
    """The code that a storage client gave its error, such as ``NoSuchKey``; empty where there is none."""
    response = getattr(error, 'response', None)  # botocore's
    if isinstance(response, dict):
        return str(response.get('Error', {}).get('Code'))
    return str(getattr(error, 'status', ''))  # OCI's


@contextmanager
def about(where: str) -> Iterator[None]:
    """Complaints inside begin with what they are about, such as a checkpoint or a key, unless they do already."""
    try:
        yield
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(where) else f'{where}: {message}') from error


@contextmanager
def user_errors(where: object, *kinds: type[Exception], kind: bool = False) -> Iterator[None]:
    """Turn errors of libraries and of the operating system into a :class:`UserError` of one line.

    Args:
        where: what the line begins with: a key, a file, an address. Where the operating system names a
            file of its own, that stands there instead.
        *kinds: the classes to turn. Default: any ``Exception``.
        kind: see :func:`one_line`.

    Raises:
        UserError: in the place of one of these; a ``UserError`` passes as it is.
    """
    turned = kinds or (Exception,)
    try:
        yield
    except UserError:
        raise
    except turned as error:
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            raise UserError(f'{error.filename or where}: {error.strerror}') from error
        raise UserError(f'{where}: {one_line(error, kind=kind) or type(error).__name__}') from error
