"""Arguments from a YAML, held against what they are for before it is called."""

import dataclasses
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dhrd_plugin.errors import UserError, nearest
from dhrd_plugin.times import parse_time


class Range(NamedTuple):
    """The numbers that a key may have; never infinity, nor NaN."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # whether ``low`` itself is out
    below: bool = False  # whether ``high`` itself is out

    def has(self, value: float) -> bool:
        """Whether a number is in the range."""
        at_ends = (value == self.low and self.above) or (value == self.high and self.below)
        return math.isfinite(value) and self.low <= value <= self.high and not at_ends

    def __str__(self) -> str:
        if math.isinf(self.low):
            return 'a finite number'
        if math.isinf(self.high):
            return f'a number above {self.low}' if self.above else f'a number of {self.low} or more'
        return f'a number from {self.low} to {"below " if self.below else ""}{self.high}'


_NEGATIVE_TIME = re.compile(r'-[\d.]+(ba|ep|sp|tok|dur|iter)')  # also where the hint says no more than `str`


def within(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> dict[str, Range]:
    """The ``metadata`` of a dataclass's field whose number, or every number in it at any depth, is in a `Range`."""
    return {'range': Range(low, high, above, below)}


def check_numbers(value: Any, where: str) -> None:
    """Refuse a number, at any depth, that is out of its field's range, or not finite.

    Args:
        value: a dataclass, whose fields may have a range by :func:`within`.
        where: what the message begins with.

    Raises:
        UserError: names the key.
    """
    for key, number, allowed in _numbers(value, '', Range()):
        if not allowed.has(number):
            raise UserError(f'{where}: {key[1:]}: found {number}; expected {allowed}')


def _numbers(value: Any, key: str, allowed: Range) -> Iterator[tuple[str, float, Range]]:
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _numbers(getattr(value, item.name), f'{key}.{item.name}', item.metadata.get('range', allowed))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f'{key}.{name}', allowed)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key, allowed)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value, allowed


def check_arguments(target: Callable[..., Any], kwargs: Mapping[str, Any], key: str, given: Iterable[str] = ()) -> None:
    """Hold arguments against a function's, or a constructor's, signature and type hints.

    Args:
        target: what they are for.
        kwargs: the arguments.
        key: where they stand in the YAML, for messages.
        given: arguments that are not the YAML's to give (``params`` of an optimizer).

    Raises:
        UserError: an unknown argument, a missing one, a wrong type; where a Composer time is expected, a text that
            is none.
    """
    import typeguard

    call = target.__init__ if inspect.isclass(target) else target
    parameters = [item for item in inspect.signature(target).parameters.values() if item.name not in given]
    open_ended = any(item.kind is item.VAR_KEYWORD for item in parameters)
    named = {item.name: item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    try:
        hints = typing.get_type_hints(call)
    except Exception:  # annotations that only a type checker can resolve say nothing at run time
        hints = {}
    for argument, value in kwargs.items():
        if argument not in named and not open_ended:
            raise UserError(f'{key}.{argument}: unknown key; {nearest(argument, sorted(named))}')
        if argument in hints:
            try:
                # YAML has lists where a function wants a tuple.
                tuples = isinstance(value, list) and 'tuple' in _kinds(hints[argument])
                typeguard.check_type(tuple(value) if tuples else value, hints[argument])
            except typeguard.TypeCheckError:
                wanted = inspect.formatannotation(hints[argument]).replace('typing.', '')
                raise UserError(f'{key}.{argument}: found {value!r}; expected {wanted}') from None
            if isinstance(value, str) and (_NEGATIVE_TIME.fullmatch(value) or 'Time' in _kinds(hints[argument])):
                parse_time(value, f'{key}.{argument}')
    for argument, parameter in named.items():
        if parameter.default is parameter.empty and argument not in kwargs:
            name = getattr(target, '__name__', target)
            raise UserError(f'{key}.{argument}: missing; {name} needs it')


def _kinds(hint: Any) -> set[str]:
    """The names of the classes in a type hint such as ``Union[str, Time[int]]``."""
    return {getattr(typing.get_origin(part) or part, '__name__', '') for part in (hint, *typing.get_args(hint))}
