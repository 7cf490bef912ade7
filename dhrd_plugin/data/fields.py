"""The fields of a row, as a template spells them: ``name``, ``name[key]``, and in a prompt ``{name:d}``."""

import math
import re
import string
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from numbers import Real
from typing import Any

from dhrd_plugin.data.triplet import BadRow, check_id, spell

# A column, whose name may hold dots or stand in brackets, then keys. Nothing reaches an attribute.
_FIELD = re.compile(r'([^\[\]{}.!:]+(\.[^\[\]{}.!:_][^\[\]{}.!:]*)*|\[[^\[\]{}]+\])(\[[^\[\]{}]+\])*')


def is_field(name: str) -> bool:
    """Whether a name is one of a field, as a template spells it."""
    return _FIELD.fullmatch(name) is not None


@lru_cache(maxsize=256)
def path_of(name: str) -> tuple[str, ...]:
    """``target[span1_text]`` as ('target', 'span1_text')."""
    return tuple(part.rstrip(']') for part in name.split('[') if part)


@lru_cache(maxsize=256)
def parse_format(text: str) -> tuple[tuple[str, str, str], ...]:
    """A format string as (literal, field, format spec) triples; fields reach items, never attributes."""
    parts = []
    for literal, name, spec, conversion in string.Formatter().parse(text):
        if name is not None and (conversion or not is_field(name)):
            raise ValueError(f'{{{name}}} is not a field; write {{name}}, {{name[key]}} or {{[any name]}}')
        parts.append((literal, name or '', spec or ''))
    return tuple(parts)


def check_number_format(name: str, spec: str) -> None:
    """Refuse what formats no number, what is a field itself, and what prints thousands of characters."""
    for zero in (0, 0.0) if not re.search(r'{|\d{4}', spec) else ():
        with suppress(ValueError):
            format(zero, spec)
            return
    raise ValueError(f'{{{name}:{spec}}} holds no format of a number, such as {{{name}:d}} or {{{name}:.2f}}')


def _keys(scope: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The keys of a field; of a column whose name has brackets itself, ``Text [EN]``, that name."""
    return (name,) if name in scope else path_of(name)


def look_up(scope: Mapping[str, Any], name: str) -> Any:
    """The value of a field, which a template spells as ``name`` or ``name[key]``; None where it is missing."""
    value: Any = scope
    for key in _keys(scope, name):
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return value


def is_there(scope: Mapping[str, Any], name: str) -> bool:
    """Whether a row has the field, be its cell empty (None); not where the column or the key is missing."""
    *path, last = _keys(scope, name)
    holder = look_up(scope, path[0] + ''.join(f'[{key}]' for key in path[1:])) if path else scope
    return isinstance(holder, Mapping) and last in holder


def items_of(scope: Mapping[str, Any], name: str) -> list[Any]:
    """The value of a field that holds a list."""
    items = look_up(scope, name)
    if not isinstance(items, list):
        raise BadRow(name, 'is missing' if items is None else f'found {spell(items)}; expected a list')
    return items


def identify(scope: Mapping[str, Any], spec: str) -> str:
    """The id that a template's ``id`` or ``group`` gives a row: one field, or several put together."""
    if '{' not in spec:
        return check_id(look_up(scope, spec), spec)
    parts = parse_format(spec)
    return ''.join(literal + (check_id(look_up(scope, name), name) if name else '') for literal, name, _ in parts)


def find_id(scope: Mapping[str, Any], spec: str) -> str | None:
    """The id that a template's ``id`` gives, if the row has its fields; else what is one in the field ``id``."""
    names = [name for _, name, _ in parse_format(spec) if name] if '{' in spec else [spec]
    if spec and all(look_up(scope, name) is not None for name in names):
        return identify(scope, spec)
    with suppress(BadRow):  # a field that nobody named may hold anything
        return check_id(as_whole(scope.get('id'), True), 'id')
    return None


def is_nan(value: object) -> bool:
    """Whether a value is NaN, which pandas writes for a missing one."""
    return isinstance(value, float) and math.isnan(value)


def is_empty(value: object) -> bool:
    """Whether a value is missing, or a blank text."""
    return value is None or is_nan(value) or (isinstance(value, str) and not value.strip())


def format_number(value: Any, field: str, spec: str, typed: bool) -> str:
    """A number as its format prints it; without types its text may stand for it."""
    if value is None:
        raise BadRow(field, 'is missing')
    number: Any = value if typed or not isinstance(value, str) else _parse_number(value)
    if not _is_finite(number):
        raise BadRow(field, f'found {spell(value)}; expected a number')
    for found in (number, *([int(number)] if number == int(number) else [])):  # "2001.0" in a format of whole numbers
        with suppress(ValueError, OverflowError, TypeError):
            return format(found, spec)
    raise BadRow(field, f'found {spell(value)}; expected a number for the format {spec!r}')


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _parse_number(text: str) -> int | float | None:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return None


def as_whole(value: object, typed: bool) -> object:
    """``1`` for the ``1.0`` that pandas writes where a column of whole numbers has gaps; else the value."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    found = re.fullmatch(r'(-?\d+)\.0+', value) if not typed and isinstance(value, str) else None
    return found[1] if found else value
