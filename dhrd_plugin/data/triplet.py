"""One row: a triplet of input, label and rationale, and the checks of its fields."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, TypedDict

from dhrd_plugin.errors import UserError


class Triplet(TypedDict):
    """One row as the shards hold it.

    The empty rationale is the control ``OnlyLabel``: the sequence is input, ``<ANS>``, answer.
    """

    id: str  # unique in its set
    input_text: str  # what the classifier reads
    label: str | list[str]  # the class name, '' in an unlabelled row; of a multi-label task all of a row's, in order
    probabilities: dict[str, float] | None  # a teacher's, of every class by its name; None by default
    answer: str  # the words that stand for the label after <ANS>; '' in an unlabelled row
    rationale: str | list[str] | None  # None (no reasoning loss for this row), a text, or several to draw from
    weight: float  # of the row in the loss; 1.0 by default
    cuttable: list[int] | None  # [start, end] of the input text's characters that may be cut; None: none
    group: str  # rows of one group count as one for exact match (MultiRC's questions); '' by default


# How Streaming stores each field; the label of a multi-label task as json.
COLUMNS = {
    **dict.fromkeys(Triplet.__annotations__, 'str'),
    **{'cuttable': 'json', 'probabilities': 'json', 'rationale': 'json', 'weight': 'float64'},
}
NO_CLASS = 'none'  # the answer of a row that has none of a multi-label task's classes
BETWEEN = ', '  # the answers of a row that has several
ROUNDING = 0.01  # by which probabilities may miss a sum of 1: thirds of two decimals


def fingerprint(triplet: Mapping[str, Any], votes: int = 0) -> str:
    """Twelve hex digits that tell whether a row was written for this text and answer, by so many blind votes."""
    text = f'{triplet["input_text"]}\0{triplet["answer"]}' + (f'\0{votes}' if votes else '')
    return hashlib.sha1(text.encode()).hexdigest()[:12]


class BadRow(UserError):
    """A row that cannot become a triplet: which field, what is wrong with it, and where it stands.

    Args:
        field: the field, as the template spells it; '' where the row as a whole is at fault.
        reason: what was found and what would be right.
        where: file and line, which the reader of the file adds.
        row: the row itself, or as much of its text as could be read.
    """

    def __init__(self, field: str, reason: str, where: str = '', row: object = None):
        self.field, self.reason, self.where, self.row = field, reason, where, row
        super().__init__(', '.join(filter(None, [where, field and f'field {field}'])) + f': {reason}')

    def at(self, where: str, row: object = None) -> 'BadRow':
        """The same fault with its place."""
        return BadRow(self.field, self.reason, where, row)


def check_text(value: object, field: str, empty: bool = False) -> str:
    """Check a field that holds text and return it: it can be written as UTF-8 and, unless ``empty``, is not blank."""
    if value is None:
        raise BadRow(field, 'is missing')
    if not isinstance(value, str):
        raise BadRow(field, f'found {spell(value)}; expected text')
    if not empty and (not value or value.isspace()):
        raise BadRow(field, 'is empty')
    if not (value.isascii() or is_unicode(value)):
        raise BadRow(field, 'is not valid Unicode (a lone surrogate)')
    return value


def check_id(value: object, field: str, empty: bool = False) -> str:
    """Check an id, a text or a whole number, and return it as text; see :func:`check_text`."""
    if isinstance(value, (int, Integral)) and not isinstance(value, bool):
        with suppress(ValueError):  # Python spells no integer of more than 4,300 digits
            return str(value)
    return check_text(value, field, empty)


def check_rationale(value: object, field: str, typed: bool = True) -> str | list[str] | None:
    """Check a rationale: None, a text, or a list of at least one text; see :func:`check_text`.

    Args:
        value: what the row holds.
        field: its name, for the error.
        typed: False where a list may stand in a text, as JSON, as in a CSV file.
    """
    if value is None:
        return None
    if not typed and isinstance(value, str) and value.lstrip()[:1] == '[':  # "[sic] ..." is a text
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and value:
        return [check_text(text, f'{field}[{index}]') for index, text in enumerate(value)]
    return check_text(value, field)


def check_weight(value: object, field: str, typed: bool = True) -> float:
    """Check a weight and return it: a finite number, zero or more; None stands for 1.0.

    Args:
        value: what the row holds.
        field: its name, for the error.
        typed: False where a number may stand in a text, as in a CSV file.
    """
    return 1.0 if value is None else _number(value, field, typed)


def check_probabilities(
    value: object, field: str, names: Sequence[str] | None = None, typed: bool = True
) -> dict[str, float] | None:
    """Check probabilities of the classes and return them by name, scaled to sum to 1; None stands for none.

    Args:
        value: what the row holds: a number for each class in their order, or a mapping of every class's name to one.
        field: its name, for the error.
        names: the classes. Default: those of the mapping.
        typed: False where they may stand in a text, as JSON, as in a CSV file.
    """
    if value is None:
        return None
    if not typed and isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and names is not None:
        if len(value) != len(names):
            raise BadRow(field, f'found {len(value)}; expected {len(names)}, one for each of {", ".join(names)}')
        value = dict(zip(names, value))
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        raise BadRow(field, f'found {spell(value)}; expected a number for each class')
    if value.keys() != set(value if names is None else names):
        raise BadRow(field, f'found those of {spell([*value])}; expected those of {", ".join(names or ())}')
    found = {name: _number(value[name], f'{field}.{name}', typed=True) for name in names or value}
    total = math.fsum(found.values())
    if round(abs(total - 1), 9) > ROUNDING:
        raise BadRow(field, f'found a sum of {total:.6g}; expected 1')
    return {name: number / total for name, number in found.items()}


def check_cuttable(value: object, text: str) -> list[int] | None:
    """Check what may be cut of an input text: None, or ``[start, end]``, a run of its characters."""
    if value is None:
        return None
    good = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
    if not good or not 0 <= value[0] <= value[1] <= len(text):  # pyright: ignore[reportIndexIssue]
        raise BadRow(
            'cuttable', f'found {spell(value)}; expected [start, end] in the {len(text)} characters of the text'
        )
    return value  # pyright: ignore[reportReturnType]


def classes_of(triplet: Mapping[str, Any]) -> list[str]:
    """The names of a row's classes: one, none of an unlabelled row, any number of a multi-label task."""
    label = triplet['label']
    return [label] if label and isinstance(label, str) else list(label)


def counted_as(triplet: Mapping[str, Any]) -> list[str]:
    """The names that a row is counted under: those of its classes, '' for an unlabelled row."""
    return classes_of(triplet) or ([''] if triplet['label'] == '' else [])


def words_of(triplet: Mapping[str, Any]) -> list[str]:
    """The answers and names of a row's classes, which its rationale should not state."""
    answer = triplet['answer']
    return [*([answer] if isinstance(triplet['label'], str) else answer.split(BETWEEN)), *classes_of(triplet)]


def rationales_of(triplet: Mapping[str, Any]) -> list[str]:
    """The texts of a row's rationale: none, one, or several; the empty one of a control is none."""
    rationale = triplet['rationale'] or []
    return [rationale] if isinstance(rationale, str) else rationale


def check_label(
    value: object, field: str = 'label', names: Collection[str] | None = None, empty: bool = False
) -> str | list[str]:
    """Check the label of a triplet and return it: a class's name, or a list of them.

    Args:
        value: what the triplet holds.
        field: its name, for the error.
        names: the classes. Default: any.
        empty: whether it may be '', that of an unlabelled row. Default: False.
    """
    several = isinstance(value, list)
    found = [check_text(name, field, empty and not several) for name in (value if several else [value])]
    for name in found:
        if name and names is not None and name not in names:
            raise BadRow(field, f'found {name!r}; expected one of {", ".join(names)}')
    if len(set(found)) < len(found):
        raise BadRow(field, f'found {spell(value)}; expected each class once')
    return found if several else found[0]


def check_target(triplet: Triplet, label: str, rationale: str) -> Triplet:
    """Refuse a row that trains nothing, or whose reasoning has no answer to end in; the names are its fields'."""
    if triplet['label'] == '' and triplet['probabilities'] is None:
        raise BadRow(label, 'is missing')
    if not triplet['answer'] and triplet['rationale'] is not None:
        raise BadRow(rationale, 'found without a label, in whose answer the reasoning would end; expected none')
    return triplet


def _number(value: object, field: str, typed: bool) -> float:
    if not typed and isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, Real, Decimal)):
        raise BadRow(field, f'found {spell(value)}; expected a number')
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not (math.isfinite(number) and number >= 0):
        found = number if isinstance(value, float) else spell(value)
        raise BadRow(field, f'found {found}; expected a finite number, zero or more')
    return number


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON can spell lone surrogates, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def spell(value: object) -> str:
    """A value as JSON spells it, so that true and "true" look different; cut to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, nested without end
        text = f'a {type(value).__name__} beyond all measure'
    text = text if len(text) <= 80 else f'{text[:76]} ...'
    return text.encode(errors='backslashreplace').decode()
