r"""Tasks: how a row of a data set becomes the input text, the label and the answer text.

A task is data, not code: a small YAML template. The seven SuperGLUE tasks of the paper stand in
``templates/``; a task of your own is the same kind of file::

    name: creak
    prompt: 'Claim: {sentence}\nIs the claim true or false?'
    id: ex_id
    label: label
    labels:
      - {value: 'false', answer: 'False'}
      - {value: 'true', answer: 'True'}
    rationale: explanation

A field is written as in Python's format strings, nested ones with brackets: ``target[span1_text]``.
"""

import contextlib
import json
import math
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhrd_plugin.errors import UserError, nearest

if TYPE_CHECKING:
    from dhrd_plugin.data.triplets import Triplet

__all__ = ['BadRow', 'Label', 'Task', 'load_task', 'task_names']

TEMPLATES = Path(__file__).parent / 'templates'
KNOWN = 'known are'
METRICS = ('accuracy', 'macro_f1', 'f1a', 'em')


class BadRow(UserError):
    """One row that cannot become a triplet: what is wrong with which field, and where it stands.

    Args:
        field (str): the field, as the template spells it; '' where the row as a whole is at fault.
        reason (str): what was found and what would be right.
        where (str): file and line, which the reader of the file adds. Default: ''.
        row (object): the row itself, or as much of its text as could be read. Default: None.
    """

    def __init__(self, field: str, reason: str, where: str = '', row: object = None):
        self.field, self.reason, self.where, self.row = field, reason, where, row
        super().__init__(', '.join(filter(None, [where, field and f'field {field}'])) + f': {reason}')

    def at(self, where: str, row: object = None) -> 'BadRow':
        """The same fault with its place."""
        return BadRow(self.field, self.reason, where, row)


@dataclass(frozen=True)
class Label:
    """One class.

    Args:
        value (str | int | bool): what stands in the rows; ``true``, ``"true"`` and ``1`` are three values.
        name (str): the class's name, as in ``label_names`` and ``id2label``.
        answer (str): the words that stand for it after ``<ANS>``.
    """

    value: str | int | bool
    name: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A template, checked. Build it with ``load_task``.

    Args:
        name (str): the task's name.
        prompt (str): the input text, a format string over the row's fields. ``{year:d}`` is a number,
            every other field must hold text.
        labels (tuple[Label, ...]): the classes, in the order of the classifier's outputs.
        label (str): the field that holds the label. Default: ``label``.
        id (str): the field of the row's id, or a format string over several; where it is empty, the
            row's number in its file is its id. Default: ''.
        group (str): field or format string; rows of one group count as one for exact match. Default: ''.
        rationale (str): the field of the rationale, which rows may lack. Default: ``rationale``.
        weight (str): the field of the row's weight, which rows may lack. Default: ``weight``.
        words (dict): for a prompt field the words to print for each of its values. Default: none.
        may_be_empty (tuple[str, ...]): prompt fields that may hold an empty text. Default: none.
        explode (tuple[str, ...]): ``'name in field'`` clauses, read like Python's ``for``: a row
            becomes one triplet for each item, which the other keys call by its name. Default: none.
        metrics (tuple[str, ...]): of accuracy, macro_f1, f1a (F1 of the second of two labels) and em (exact
            match by group). Default: accuracy.
        hub (dict): ``path`` and ``config`` of the task on the Hugging Face hub, and the keys above
            that differ there. Default: none.
    """

    name: str
    prompt: str
    labels: tuple[Label, ...]
    label: str = 'label'
    id: str = ''
    group: str = ''
    rationale: str = 'rationale'
    weight: str = 'weight'
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    may_be_empty: tuple[str, ...] = ()
    explode: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ('accuracy',)
    hub: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The classes' names, in the order of the classifier's outputs."""
        return tuple(label.name for label in self.labels)

    @cached_property
    def answers(self) -> dict[str, str]:
        """The answer text of each class name."""
        return {label.name: label.answer for label in self.labels}

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON, from which ``load_task`` builds the same task."""
        return asdict(self)

    def for_hub(self) -> 'Task':
        """The task over the hub's rows, where those are laid out in another way than the files."""
        return replace(self, hub={}, **{k: v for k, v in self.hub.items() if k not in ('path', 'config')})

    def render(self, row: Mapping[str, Any]) -> str:
        """The input text of one row.

        Raises:
            BadRow: a field of the prompt is missing, empty or not text.
            UserError: rows of this task explode into several texts; ``triplets`` gives them all.
        """
        if self.explode:
            raise UserError(f'task {self.name}: a row gives several texts; use task.triplets(row)')
        return self._text(row)

    def triplets(
        self, row: Mapping[str, Any], labelled: bool = True, typed: bool = True, number: int = 0
    ) -> 'Iterator[Triplet]':
        """The triplets of one row: one, or one for each item of an exploding row.

        Args:
            row (Mapping): the row as JSON gives it.
            labelled (bool): whether the label may not be missing. Default: True.
            typed (bool): whether values have types; the cells of a CSV file have none, there ``0``
                and ``true`` are told by their text. Default: True.
            number (int): the row's number, its id where the template names none. Default: 0.

        Raises:
            BadRow: the row does not fit the template; the error names the field.
        """
        for scope in self._scopes(row):
            text = self._text(scope)
            label = self._label(scope, labelled, typed)
            yield {
                'id': _ident(scope, self.id) if self.id else str(number),
                'input_text': text,
                'label': label.name if label else '',
                'answer': label.answer if label else '',
                'rationale': check_rationale(_lookup(scope, self.rationale), self.rationale),
                'weight': check_weight(_lookup(scope, self.weight), self.weight, typed),
                'group': _ident(scope, self.group) if self.group else '',
            }

    def _scopes(self, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        scopes: list[Mapping[str, Any]] = [row]
        for clause in self.explode:
            name, _, source = clause.partition(' in ')
            scopes = [{**scope, name: item} for scope in scopes for item in _items(scope, source)]
        return scopes

    def _text(self, scope: Mapping[str, Any]) -> str:
        parts = []
        for literal, name, spec in _parse(self.prompt):
            parts.append(literal)
            if name and spec:
                parts.append(_number(_lookup(scope, name), name, spec))
            elif name:
                text = check_text(_lookup(scope, name), name, empty=name in self.may_be_empty)
                parts.append(_word(self.words[name], text, name) if name in self.words else text)
        return ''.join(parts)

    def _label(self, scope: Mapping[str, Any], labelled: bool, typed: bool) -> Label | None:
        value = _lookup(scope, self.label)
        if value is None and not labelled:
            return None
        if value is None:
            raise BadRow(self.label, 'is missing')
        for label in self.labels:
            if _same(value, label.value) if typed else str(value) in _spellings(label.value):
                return label
        known = ', '.join(_json(label.value) for label in self.labels)
        raise BadRow(self.label, f'{_json(value)} is none of {known}')


def task_names() -> list[str]:
    """The names of the tasks that the package ships."""
    return sorted(path.stem for path in TEMPLATES.glob('*.yaml'))


def load_task(spec: 'str | Path | Mapping[str, Any] | Task') -> Task:
    """A task by its name, from a YAML template, or from a mapping of the same keys.

    Args:
        spec: a name from ``task_names()``, the path of a template, ``Task.to_dict()``, or a task.

    Raises:
        UserError: no such task or file, or a key that is unknown, missing or of the wrong kind.

    Example:
        >>> load_task('rte').label_names
        ('entailment', 'not_entailment')
    """
    if isinstance(spec, Task):
        return spec
    if isinstance(spec, Mapping):
        return _from_mapping(spec, f'task {spec.get("name", "")}')
    if str(spec) in task_names():
        return load_task(TEMPLATES / f'{spec}.yaml')
    path = Path(spec)
    if path.suffix not in ('.yaml', '.yml'):
        raise UserError(f'unknown task {str(spec)!r}; {nearest(str(spec), task_names(), KNOWN)}')
    return _from_mapping(_read_yaml(path), str(path))


def check_text(value: object, field: str, empty: bool = False) -> str:
    """``value`` if it is a text that can be written as UTF-8, and not blank unless ``empty``."""
    if value is None:
        raise BadRow(field, 'is missing')
    if not isinstance(value, str):
        raise BadRow(field, f'{_json(value)} where text belongs')
    if not empty and (not value or value.isspace()):
        raise BadRow(field, 'is empty')
    if not (value.isascii() or is_unicode(value)):
        raise BadRow(field, 'is not valid Unicode (a lone surrogate)')
    return value


def check_id(value: object, field: str) -> str:
    """``value`` as a text if it is a text or a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, field)


def check_rationale(value: object, field: str) -> str | list[str] | None:
    """``value`` if it is None, a text, or a list of at least one text."""
    if value is None:
        return None
    if isinstance(value, list) and value:
        return [check_text(text, f'{field}[{index}]') for index, text in enumerate(value)]
    return check_text(value, field)


def check_weight(value: object, field: str, typed: bool = True) -> float:
    """The weight as a float; 1.0 where the row has none."""
    if value is None:
        return 1.0
    if not typed and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(field, f'{_json(value)} where a number belongs')
    if not (math.isfinite(value) and value >= 0):
        raise BadRow(field, f'{value} where a finite number, zero or more, belongs')
    return float(value)


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: JSON can spell lone surrogates, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------
# Fields and format strings

_FIELD = re.compile(r'[^\[\]{}.!:]+(\[[^\[\]{}]+\])*')


@lru_cache(maxsize=256)
def _path(name: str) -> tuple[str, ...]:
    """``target[span1_text]`` as ('target', 'span1_text')."""
    return tuple(part.rstrip(']') for part in name.split('['))


@lru_cache(maxsize=256)
def _parse(text: str) -> tuple[tuple[str, str, str], ...]:
    """A format string as (literal, field, format spec) triples; fields reach items, never attributes."""
    parts = []
    for literal, name, spec, conversion in string.Formatter().parse(text):
        if name is not None and (conversion or not _FIELD.fullmatch(name)):
            raise ValueError(f'{{{name}}} is not a field; write {{name}} or {{name[key]}}')
        parts.append((literal, name or '', spec or ''))
    return tuple(parts)


def _lookup(scope: Mapping[str, Any], name: str) -> Any:
    """The field's value, None where it is missing."""
    value: Any = scope
    for key in _path(name):
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return value


def _items(scope: Mapping[str, Any], name: str) -> list[Any]:
    items = _lookup(scope, name)
    if not isinstance(items, list):
        raise BadRow(name, 'is missing' if items is None else f'{_json(items)} where a list belongs')
    return items


def _ident(scope: Mapping[str, Any], spec: str) -> str:
    """An id: one field, or several put together by a format string."""
    if '{' not in spec:
        return check_id(_lookup(scope, spec), spec)
    return ''.join(
        literal + (check_id(_lookup(scope, name), name) if name else '') for literal, name, _ in _parse(spec)
    )


def _number(value: object, field: str, spec: str) -> str:
    if value is None:
        raise BadRow(field, 'is missing')
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(field, f'{_json(value)} where a number belongs')
    try:
        return format(value, spec)
    except ValueError:
        raise BadRow(field, f'{value} does not fit the format {spec!r}') from None


def _word(table: Mapping[str, str], text: str, field: str) -> str:
    if text not in table:
        raise BadRow(field, f'{_json(text)} is none of {", ".join(map(_json, table))}')
    return table[text]


def _same(value: object, other: object) -> bool:
    # Python says 1 == True; JSON does not.
    return type(value) is type(other) and value == other


def _spellings(value: str | int | bool) -> tuple[str, str]:
    return str(value), str(value).lower() if isinstance(value, bool) else str(value)


def _json(value: object) -> str:
    """The value as JSON spells it, so that true and "true" look different; cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f'{text[:76]} ...'


# ------------------------------------------------------------------------------------------------
# Checking templates

_KINDS: dict[str, type] = {
    'name': str, 'prompt': str, 'labels': list, 'label': str, 'id': str, 'group': str, 'rationale': str,
    'weight': str, 'words': dict, 'may_be_empty': list, 'explode': list, 'metrics': list, 'hub': dict,
}  # fmt: skip
_KIND_NAMES = {str: 'a text', list: 'a list', dict: 'a mapping'}


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text('utf-8'))
    except OSError as error:
        raise UserError(f'{path}: cannot read the template: {error.strerror}') from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: not valid YAML: {" ".join(str(error).split())}') from None
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: expected a mapping of keys, see the package's templates")
    return data


def _from_mapping(data: Mapping[str, Any], where: str) -> Task:
    _check_keys(data, where, _KINDS)
    missing = [key for key in ('name', 'prompt', 'labels') if not data.get(key)]
    if missing:
        raise UserError(f'{where}: the key {missing[0]!r} is missing')
    hub = data.get('hub', {})
    _check_keys(hub, f'{where}: hub', {**_KINDS, 'path': str, 'config': str})
    values: dict[str, Any] = {**_tuples(data), 'labels': _labels(data['labels'], where), 'hub': _tuples(hub)}
    task = Task(**values)
    _check_task(task, where)
    _check_task(task.for_hub(), f'{where}: hub')
    return task


def _check_keys(data: Mapping[str, Any], where: str, kinds: Mapping[str, type]) -> None:
    for key, value in data.items():
        if key not in kinds:
            raise UserError(f'{where}: unknown key {key!r}; {nearest(str(key), kinds, KNOWN)}')
        kind = kinds[key]
        if not isinstance(value, tuple | list if kind is list else Mapping if kind is dict else kind):
            raise UserError(f'{where}: {key}: expected {_KIND_NAMES[kind]}, found {_json(value)}')


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _labels(items: list[Any], where: str) -> tuple[Label, ...]:
    labels = []
    for item in items:
        item = item if isinstance(item, Mapping) else {'value': item}
        value = item.get('value')
        if not isinstance(value, str | int):
            expected = 'a text, a whole number or true/false'
            raise UserError(f'{where}: labels: value: expected {expected}, found {_json(value)}')
        _check_keys(item, f'{where}: labels', {'value': type(value), 'name': str, 'answer': str})
        name = item.get('name', str(value))
        labels.append(Label(value, name, item.get('answer', name)))
    for part in ('value', 'name', 'answer'):
        parts = [_json(getattr(label, part)) for label in labels]
        if len(set(parts)) < max(2, len(parts)):
            found = ', '.join(parts)
            raise UserError(f'{where}: labels: expected two or more, each {part} once, found {found}')
    return tuple(labels)


def _check_task(task: Task, where: str) -> None:
    """The fields' spelling, and that the keys which speak of the prompt's fields name such fields."""
    named = {
        'prompt': task.prompt,
        'id': task.id if '{' in task.id or not task.id else f'{{{task.id}}}',
        'group': task.group if '{' in task.group or not task.group else f'{{{task.group}}}',
        **{key: f'{{{getattr(task, key)}}}' for key in ('label', 'rationale', 'weight')},
    }
    for key, text in named.items():
        try:
            _parse(text)
        except ValueError as error:
            raise UserError(f'{where}: {key}: {error}') from None
    for clause in task.explode:
        name, found, source = clause.partition(' in ')
        if not (found and name.isidentifier() and _FIELD.fullmatch(source)):
            raise UserError(f"{where}: explode: expected 'name in field', found {clause!r}")
    prompt_fields = [name for _, name, _ in _parse(task.prompt) if name]
    if not prompt_fields:
        raise UserError(f'{where}: prompt: names no field; write one as {{name}}')
    for key, names in (('words', task.words), ('may_be_empty', task.may_be_empty)):
        for name in names:
            if name not in prompt_fields:
                near = nearest(name, prompt_fields, KNOWN)
                raise UserError(f'{where}: {key}: the prompt has no field {name!r}; {near}')
    for metric in task.metrics:
        if metric not in METRICS:
            raise UserError(f'{where}: metrics: unknown metric {metric!r}; {nearest(str(metric), METRICS, KNOWN)}')
    if 'em' in task.metrics and not task.group:
        raise UserError(f'{where}: metrics: em, exact match by group, needs the key group')
    if 'f1a' in task.metrics and len(task.labels) != 2:
        raise UserError(f'{where}: metrics: f1a needs two labels, the second the positive one; use macro_f1')
