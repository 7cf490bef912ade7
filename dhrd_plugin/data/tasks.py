"""Tasks: how a row of a data set becomes the input text, the label and the answer text.

A task is data, not code: a small YAML template. The seven SuperGLUE tasks of the paper are in
``templates/``; README.md tells how to write one of your own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml

from dhrd_plugin.data.fields import (
    as_whole,
    check_number_format,
    find_id,
    format_number,
    identify,
    is_empty,
    is_field,
    is_nan,
    is_there,
    items_of,
    look_up,
    parse_format,
    path_of,
)
from dhrd_plugin.data.triplet import (
    BETWEEN,
    NO_CLASS,
    BadRow,
    Triplet,
    check_probabilities,
    check_rationale,
    check_target,
    check_text,
    check_weight,
    spell,
)
from dhrd_plugin.errors import UserError, nearest, user_errors
from dhrd_plugin.problem_type import MULTI_LABEL, PROBLEM_TYPES, SINGLE_LABEL

TEMPLATES = Path(__file__).parent / 'templates'
METRICS = ('accuracy', 'macro_f1', 'f1a', 'em')
MULTI_LABEL_METRICS = ('micro_f1', 'macro_f1', 'exact_match')


@dataclass(frozen=True)
class Label:
    """One class."""

    value: str | int | bool  # what the rows hold; true, "true" and 1 are three values
    name: str  # as in label_names and id2label
    answer: str  # the words that stand for it after <ANS>

    def matches(self, value: object, typed: bool) -> bool:
        """Whether a row's value means this class; see :meth:`Task.triplets`."""
        if typed:  # Python says 1 == True; JSON does not
            return type(value) is type(self.value) and value == self.value
        known = str(self.value)
        return str(value) in ((known, known.lower()) if isinstance(self.value, bool) else (known,))


@dataclass(frozen=True)
class Task:
    """A template, checked. Build it with :func:`load_task`.

    Attributes:
        prompt: the input text, a format string over the row's fields. ``{year:d}`` is a number,
            every other field must hold text. Where cells have no types a number stands in its text.
        name: the task's name. Default: ``own``.
        labels: the classes, in the order of the classifier's outputs. Default: none; they are found in the training
            rows, see :mod:`dhrd_plugin.data.labels`.
        label: the field of the label. Default: ``label``.
        problem_type: ``single_label_classification``, or ``multi_label_classification``, where ``label`` holds a list
            of the row's classes, which may be empty; in a CSV file as JSON. Default: the former.
        label_separator: what stands between the classes where ``label`` holds them as one text. Default: '', a list.
        id: the field of the row's id, or a format string over several; where it is empty, the
            row's number in its file is its id, and behind it the item's where rows explode. Default: ''.
        group: field or format string; rows of one group count as one for exact match. Default: ''.
        rationale: the field of the rationale, which rows may lack. Default: ``rationale``.
        weight: the field of the row's weight, which rows may lack. Default: ``weight``.
        probabilities: the field of a teacher's probabilities, which rows may lack. Default: ``probabilities``.
        words: for a prompt field, the words to print for each of its values. Default: none.
        may_be_empty: prompt fields that may be empty: an empty text, an empty cell, null, or NaN. Default: none.
        truncate: the prompt field that is cut at its end where the input is longer than ``max_seq_len``. Default:
            none; such an input is refused.
        explode: ``'name in field'`` clauses, read like Python's ``for``: a row becomes one triplet for
            each item, which the other keys call by its name. Default: none.
        metrics: of ``METRICS``: accuracy, macro_f1, f1a (F1 of the second of two labels) and em (exact
            match by group); multi-label of ``MULTI_LABEL_METRICS``: micro_f1, macro_f1 and exact_match (of a
            row's classes). Default: accuracy, or micro_f1 and macro_f1.
        hub: ``path`` and ``config`` of the task on the Hugging Face hub, and the keys above
            that differ there. Default: none.
    """

    prompt: str
    name: str = 'own'
    labels: tuple[Label, ...] = ()
    label: str = 'label'
    problem_type: str = SINGLE_LABEL
    label_separator: str = ''
    id: str = ''
    group: str = ''
    rationale: str = 'rationale'
    weight: str = 'weight'
    probabilities: str = 'probabilities'
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    may_be_empty: tuple[str, ...] = ()
    truncate: str = ''
    explode: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ('accuracy',)
    hub: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The class names, in the order of the classifier's outputs."""
        return tuple(label.name for label in self.labels)

    @cached_property
    def answers(self) -> dict[str, str]:
        """The answer text of each class name."""
        return {label.name: label.answer for label in self.labels}

    @property
    def multi_label(self) -> bool:
        """Whether a row has any number of classes."""
        return self.problem_type == MULTI_LABEL

    def answer_of(self, label: str | list[str]) -> str:
        """The answer text of a triplet's label; '' without one."""
        if isinstance(label, str):
            return self.answers.get(label, '')
        return BETWEEN.join(self.answers[name] for name in label) or NO_CLASS

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields of the prompt, as it spells them, each once."""
        return tuple(dict.fromkeys(name for _, name, _ in parse_format(self.prompt) if name))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON, from which :func:`load_task` builds the same task."""
        return asdict(self)

    def for_hub(self) -> 'Task':
        """The task for the hub's rows, whose layout may differ from the files'."""
        return replace(self, hub={}, **{k: v for k, v in self.hub.items() if k not in ('path', 'config')})

    def fill(self, text: str) -> tuple[str, list[int] | None]:
        """The input text, and what of it may be cut, where ``text``, which has no type, is the prompt's only field."""
        scope: Any = text
        for key in reversed(path_of(self.fields[0])):
            scope = {key: scope}
        return self._text(scope, typed=False)

    def texts(self, row: Mapping[str, Any], typed: bool = True) -> Iterator[tuple[str | None, str, list[int] | None]]:
        """The id, if there is one, the input text, and what of it may be cut, of each triplet of a row.

        Args:
            row: the row as JSON gives it.
            typed: as for :meth:`triplets`. Default: True.

        Raises:
            BadRow: a field of the prompt is missing, empty or not text; an id is no text or whole number.
        """
        for scope in self.scopes(row):
            text, cuttable = self._text(scope, typed)  # first, as what is wrong with it is what people look for
            yield find_id(scope, self.id), text, cuttable

    def triplets(
        self, row: Mapping[str, Any], labelled: bool = True, typed: bool = True, number: int = 0
    ) -> Iterator[Triplet]:
        """The triplets of one row: one, or one for each item of an exploding row.

        Args:
            row: the row as JSON gives it.
            labelled: whether the row must have a label or probabilities. Default: True.
            typed: whether values have types; the cells of a CSV file have none, there ``0``,
                ``true`` and numbers are told by their text. Default: True.
            number: the row's number, its id where the template names none. Default: 0.

        Raises:
            BadRow: the row does not fit the template; the error names the field.
        """
        for item, scope in enumerate(self.scopes(row), 1):
            text, cuttable = self._text(scope, typed)
            label = self._label(scope, typed)
            triplet: Triplet = {
                'id': identify(scope, self.id) if self.id else f'{number}-{item}' if self.explode else str(number),
                'input_text': text,
                'label': label,
                'answer': self.answer_of(label),
                'rationale': check_rationale(look_up(scope, self.rationale), self.rationale, typed),
                'weight': check_weight(look_up(scope, self.weight), self.weight, typed),
                'group': identify(scope, self.group) if self.group else '',
                'probabilities': self._probabilities(scope, typed),
                'cuttable': cuttable,
            }
            yield check_target(triplet, self.label, self.rationale) if labelled else triplet

    def scopes(self, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The row, or for each of its items the row with the item under its name; see ``explode``."""
        scopes: list[Mapping[str, Any]] = [row]
        for clause in self.explode:
            name, _, source = clause.partition(' in ')
            scopes = [{**scope, name: item} for scope in scopes for item in items_of(scope, source)]
        return scopes

    def _text(self, scope: Mapping[str, Any], typed: bool = True) -> tuple[str, list[int] | None]:
        parts: list[str] = []
        cuttable = None
        for literal, name, spec in parse_format(self.prompt):
            parts.append(literal)
            if not name:
                continue
            start = sum(map(len, parts))
            parts.append(self._field(scope, name, spec, typed))
            if name == self.truncate:
                cuttable = [start, start + len(parts[-1])]
        return ''.join(parts), cuttable

    def _field(self, scope: Mapping[str, Any], name: str, spec: str, typed: bool) -> str:
        """What a field of the prompt prints."""
        value, words = look_up(scope, name), self.words.get(name)
        if name in self.may_be_empty and is_empty(value) and (value is not None or is_there(scope, name)):
            text = value if isinstance(value, str) else ''
            return text if words is None else words.get(text, '')
        if value is None and is_there(scope, name):
            raise BadRow(name, f'is missing (empty, or null); may_be_empty: [{name}] in the template lets it be')
        if isinstance(value, str) and not value.strip():
            raise BadRow(name, f'is empty; may_be_empty: [{name}] in the template lets it be')
        if spec:
            return format_number(value, name, spec, typed)
        text = check_text(value, name)
        if words is None:
            return text
        if text not in words:
            raise _unknown(text, words, name)
        return words[text]

    def _probabilities(self, scope: Mapping[str, Any], typed: bool) -> dict[str, float] | None:
        value = look_up(scope, self.probabilities)
        if self.multi_label and value is not None:
            raise BadRow(self.probabilities, f'found {spell(value)} in a {MULTI_LABEL} task; expected none')
        return check_probabilities(value, self.probabilities, self.label_names, typed)

    def values(self, scope: Mapping[str, Any], typed: bool = True) -> list[Any] | None:
        """What a row's label field holds: one value, of a multi-label task any number; None where it is missing."""
        value = look_up(scope, self.label)
        if value is None or is_nan(value):  # pandas' missing
            return None
        if not self.multi_label:
            return [value]
        if isinstance(value, str) and self.label_separator:
            return [part.strip() for part in value.split(self.label_separator) if part.strip()]
        if isinstance(value, str) and not typed:
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        if not isinstance(value, list):
            told = '' if self.label_separator else ', or label_separator in the template'
            raise BadRow(self.label, f'found {spell(value)}; expected a list of labels ([] for none of them){told}')
        return value

    def _label(self, scope: Mapping[str, Any], typed: bool) -> str | list[str]:
        """The label of a triplet."""
        values = self.values(scope, typed)
        if values is None:
            return ''
        names = [self._class(value, typed).name for value in values]
        if not self.multi_label:
            return names[0]
        if len(set(names)) < len(names):
            raise BadRow(self.label, f'found {spell(values)}; expected each label once')
        return sorted(names, key=self.label_names.index)

    def _class(self, value: object, typed: bool) -> Label:
        for found in (value, as_whole(value, typed)):  # "1.0" may be a class of its own
            for label in named_labels(self).labels:
                if label.matches(found, typed):
                    return label
        raise _unknown(value, [label.value for label in self.labels], self.label)


def task_names() -> list[str]:
    """The names of the tasks that the package ships."""
    return sorted(path.stem for path in TEMPLATES.glob('*.yaml'))


def load_task(spec: str | Path | Mapping[str, Any] | Task) -> Task:
    """Load a task by its name, from a YAML template, or from a mapping of the same keys.

    Args:
        spec: a name of :func:`task_names`, the path of a template, :meth:`Task.to_dict`, or a task.

    Raises:
        UserError: no such task or file, or a key that is unknown, missing or of the wrong kind.

    Example:
        >>> load_task('rte').label_names
        ('entailment', 'not_entailment')
    """
    if isinstance(spec, Task):
        return spec
    if isinstance(spec, Mapping):
        return _from_mapping(spec, f'task {spec["name"]}' if spec.get('name') else 'task')
    if not isinstance(spec, str | Path):
        raise UserError(f'task: found {spell(spec)}; expected a name, the path of a template, or a mapping of its keys')
    path = TEMPLATES / f'{spec}.yaml' if str(spec) in task_names() else Path(spec)
    if path.suffix not in ('.yaml', '.yml'):
        raise UserError(f'unknown task {str(spec)!r}; {nearest(str(spec), task_names())}')
    if path.exists() and not path.is_file():
        raise UserError(f'{path}: is not a file; expected a YAML template')
    with user_errors(f'{path}: not valid YAML', OSError, ValueError, RecursionError, yaml.YAMLError):
        data = yaml.safe_load(path.read_text('utf-8'))
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: found {spell(data)}; expected a mapping of keys, see the package's templates")
    return _from_mapping(data, str(path))


def named_labels(task: Task) -> Task:
    """The task, which has to name its labels: there are no training rows to find them in."""
    if not task.labels:
        raise UserError(f'task {task.name}: labels: missing; expected the classes, two or more')
    return task


def _unknown(value: object, known: Iterable[object], field: str) -> BadRow:
    return BadRow(field, f'found {spell(value)}; expected one of {", ".join(map(spell, known))}')


# The kind of each key of a template: str, tuple or Mapping.
_KINDS: dict[str, type] = {name: get_origin(hint) or hint for name, hint in get_type_hints(Task).items()}
_KIND_NAMES: dict[type, str] = {str: 'a text', tuple: 'a list', Mapping: 'a mapping'}


def _from_mapping(data: Mapping[str, Any], where: str) -> Task:
    _check_keys(data, where, _KINDS)
    if not data.get('prompt'):
        raise UserError(f"{where}: the key 'prompt' is missing")
    if not data.get('name', 'own'):
        raise UserError(f'{where}: name: is empty; leave it out, or give one')
    hub = data.get('hub', {})
    _check_keys(hub, f'{where}: hub', {**_KINDS, 'path': str, 'config': str})
    if 'labels' in hub:
        hub = {**hub, 'labels': build_labels(hub['labels'], f'{where}: hub')}
    labels = build_labels(data['labels'], where) if data.get('labels') else ()
    if data.get('problem_type') == MULTI_LABEL:
        data = {'metrics': MULTI_LABEL_METRICS[:2], **data}
    task = Task(**{**_tuples(data), 'labels': labels, 'hub': _tuples(hub)})
    _check_task(task, where)
    _check_task(task.for_hub(), f'{where}: hub')
    return task


def _check_keys(data: Mapping[str, Any], where: str, kinds: Mapping[str, type]) -> None:
    for key, value in data.items():
        if key not in kinds:
            raise UserError(f'{where}: unknown key {key!r}; {nearest(str(key), kinds)}')
        kind = kinds[key]
        if not isinstance(value, (tuple, list) if kind is tuple else kind):
            raise UserError(f'{where}: {key}: found {spell(value)}; expected {_KIND_NAMES[kind]}')


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def build_labels(items: Iterable[Any], where: str) -> tuple[Label, ...]:
    """The classes of a template's ``labels``: values, or mappings of ``value``, ``name`` and ``answer``."""
    labels = []
    for item in items:
        item = item if isinstance(item, Mapping) else {'value': item}
        value = item.get('value')
        if not isinstance(value, str | int):
            found = spell(value)
            raise UserError(f'{where}: labels: value: found {found}; expected a text, a whole number or true/false')
        _check_keys(item, f'{where}: labels', {'value': type(value), 'name': str, 'answer': str})
        name = item.get('name', str(value))
        labels.append(Label(value, name, item.get('answer', name)))
    for part in ('value', 'name', 'answer'):
        parts = [spell(getattr(label, part)) for label in labels]
        if len(set(parts)) < max(2, len(parts)):
            found = ', '.join(parts)
            raise UserError(f'{where}: labels: found {found}; expected two or more, each {part} once')
    return tuple(labels)


def with_found_labels(task: Task, labels: tuple[Label, ...], where: str) -> Task:
    """The task with labels that its template does not name, checked as if it did; ``where`` begins the errors."""
    task = replace(task, labels=labels)
    _check_task(task, where)
    return task


def _check_problem(task: Task, where: str) -> None:
    """Check the kind of labels."""
    if task.problem_type not in PROBLEM_TYPES:
        raise UserError(
            f'{where}: problem_type: found {task.problem_type!r}; expected one of {", ".join(PROBLEM_TYPES)} (numbers '
            'cannot be predicted)'
        )
    if task.label_separator and not task.multi_label:
        raise UserError(f'{where}: label_separator: found without problem_type: {MULTI_LABEL}; expected both')
    for label in task.labels if task.multi_label else ():
        if label.answer.strip().casefold() == NO_CLASS or BETWEEN in label.answer:
            raise UserError(
                f'{where}: labels: answer: found {label.answer!r}; expected no comma in it, and not '
                f'{NO_CLASS!r}, which stands for a row without any; the template may give the label another answer'
            )


def _check_task(task: Task, where: str) -> None:
    """Check how fields are written, and that ``words`` and ``may_be_empty`` name fields of the prompt."""
    for key in ('prompt', 'id', 'group', 'label', 'rationale', 'weight', 'probabilities'):
        text = getattr(task, key)
        is_format = key == 'prompt' or (key in ('id', 'group') and ('{' in text or not text))
        with user_errors(f'{where}: {key}', ValueError):
            parse_format(text if is_format else f'{{{text}}}')
    _check_problem(task, where)
    for key in ('explode', 'may_be_empty', 'metrics'):
        for item in getattr(task, key):
            if not isinstance(item, str):
                raise UserError(f'{where}: {key}: found {spell(item)}; expected a list of texts')
    for clause in task.explode:
        name, found, source = clause.partition(' in ')
        if not (found and name.isidentifier() and is_field(source)):
            raise UserError(f"{where}: explode: found {clause!r}; expected 'name in field'")
    if '\\n' in task.prompt:
        raise UserError(
            f'{where}: prompt: found a backslash and an n; for a line break use "..." or a block |- in YAML'
        )
    prompt_fields = [name for _, name, _ in parse_format(task.prompt) if name]
    with user_errors(f'{where}: prompt', ValueError):
        for _, name, spec in parse_format(task.prompt):
            if spec:
                check_number_format(name, spec)
    if not prompt_fields:
        raise UserError(f'{where}: prompt: names no field; write one as {{name}}')
    truncate = (task.truncate,) if task.truncate else ()
    for key, names in (('words', task.words), ('may_be_empty', task.may_be_empty), ('truncate', truncate)):
        for name in names:
            if name not in prompt_fields:
                raise UserError(f'{where}: {key}: the prompt has no field {name!r}; {nearest(name, prompt_fields)}')
    for name, words in task.words.items():
        if not (isinstance(words, Mapping) and all(isinstance(word, str) for pair in words.items() for word in pair)):
            raise UserError(f'{where}: words: {name}: found {spell(words)}; expected a mapping of texts to texts')
    known = MULTI_LABEL_METRICS if task.multi_label else METRICS
    for metric in task.metrics:
        if metric not in known:
            raise UserError(f'{where}: metrics: unknown metric {metric!r}; {nearest(metric, known)}')
    if 'em' in task.metrics and not task.group:
        raise UserError(f'{where}: metrics: em, exact match by group, needs the key group')
    if prompt_fields.count(task.truncate) > 1:
        raise UserError(f'{where}: truncate: the prompt has {task.truncate!r} twice; expected it once')
    if 'f1a' in task.metrics and task.labels and len(task.labels) != 2:
        raise UserError(f'{where}: metrics: f1a needs two labels, the second the positive one; use macro_f1')
