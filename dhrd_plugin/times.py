"""Composer's time strings, checked."""

from typing import Any

from dhrd_plugin.errors import UserError


def parse_time(text: Any, key: str, least: float = 0) -> Any:
    """A :class:`composer.Time` of a time string.

    Args:
        text: a number and a unit: ``'2ep'``, ``'40ba'``, ``'0.5dur'`` ...
        key: what the message begins with.
        least: the smallest number that is right. Default: 0.

    Raises:
        UserError: it is none, or its number is below ``least``.
    """
    from composer import Time

    try:
        time = Time.from_timestring(text)
    except Exception:  # of many kinds
        raise UserError(f"{key}: found {text!r}; expected a Composer time string such as '2ep' or '40ba'") from None
    if not least <= time.value < float('inf'):
        raise UserError(f'{key}: found {text!r}; expected a time of {least} or more')
    return time


def parse_interval(text: Any, key: str) -> Any:
    """As :func:`parse_time`, of what happens again and again; ``0ba`` and ``0ep`` are never.

    Raises:
        UserError: besides, it is ``0dur``, by which Composer divides, or counts iterations, of which a run has one.
    """
    time = parse_time(text, key)
    if time.unit.value == 'iter':
        raise UserError(f"{key}: found {text!r}; expected epochs, batches or a share, as '1ep', '40ba', '0.1dur'")
    if time.unit.value == 'dur' and not time.value:
        raise UserError(f"{key}: found {text!r}; expected a share of the run, as '0.1dur', or '0ep' for never")
    return time
