"""What a comparison left behind: ``comparison.yaml`` and ``results.jsonl``, read and checked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dhrd_plugin.data.tasks import METRICS
from dhrd_plugin.errors import UserError, nearest, user_errors

PLAN, RESULTS = 'comparison.yaml', 'results.jsonl'

KINDS: dict[str, Any] = {
    'task': str,
    'arm': str,
    'seed': int,
    'split': str,
    'fingerprint': str,
    'model': str,
    'metrics': dict,
    'task_metrics': list,
    'label_names': list,
    'ids': list,
    'groups': list,
    'labels': list,
    'predictions': list,
    'steps': int,
    'tokens': (int, float),
    'seconds_per_step': (int, float),
    'series': dict,
    'versions': dict,
}
ROWS = ('label_names', 'task_metrics', 'ids', 'labels', 'groups')  # what all cells of an evaluation set share

CellKey = tuple[str, str, int]  # task, arm, seed
Rows = tuple[str, str]  # task, split: an evaluation set


@dataclass(frozen=True)
class Results:
    """A comparison and as much of it as is there."""

    name: str  # of the comparison
    baseline: str  # the arm that the others are held against
    tasks: list[str]  # in the order in which they are shown
    arms: list[str]  # likewise
    seeds: list[int]  # likewise
    average: bool  # whether tasks are averaged
    text: str  # ``comparison.yaml`` as it is
    sets: list[Rows]  # the evaluation sets, as (task, split); the first of a task is the one that counts
    records: dict[tuple[str, str, str, int], dict[str, Any]]  # a line of ``results.jsonl`` by task, split, arm and seed
    missing: list[CellKey]  # cells that the comparison has and the results have not
    extra: list[CellKey]  # cells that the results have and the comparison has not; they are left out
    repeated: int  # lines that a later one of the same cell and split replaces

    @property
    def main_sets(self) -> list[Rows]:
        """The first evaluation set of each task that has one: its score is the task's."""
        return list({task: (task, split) for task, split in reversed(self.sets)}.values())[::-1]

    @property
    def further_sets(self) -> dict[str, list[Rows]]:
        """The other evaluation sets, by split."""
        further = [rows for rows in self.sets if rows not in self.main_sets]
        return {split: [rows for rows in further if rows[1] == split] for _, split in further}

    @property
    def planned(self) -> int:
        """How many cells the comparison has, there or not."""
        return len(self.tasks) * len(self.arms) * len(self.seeds)

    def example(self, rows: Rows) -> dict[str, Any]:
        """A record of an evaluation set, for what all of them share."""
        return next(record for key, record in self.records.items() if key[:2] == rows)

    def grouped(self) -> list[str]:
        """The tasks whose rows have groups, such as MultiRC's questions."""
        return [rows[0] for rows in self.main_sets if None not in self.example(rows)['groups']]

    def cells(self, rows: Rows, arm: str) -> dict[int, dict[str, Any]]:
        """What is there of an arm on an evaluation set, by seed."""
        found = ((seed, self.records.get((rows[0], rows[1], arm, seed))) for seed in self.seeds)
        return {seed: record for seed, record in found if record is not None}


def read_results(folder: Path) -> Results:
    """Read both files of a comparison.

    Args:
        folder: holds ``comparison.yaml`` and, once a cell has ended, ``results.jsonl``.
    """
    plan, text = read_plan(folder / PLAN)
    tasks, arms, seeds = list(plan['tasks']), list(plan['arms']), list(plan['seeds'])
    wanted = dict.fromkeys((task, arm, seed) for task in tasks for arm in arms for seed in seeds)
    lines = [((line['task'], line['arm'], line['seed']), line) for line in read_lines(folder / RESULTS)]
    found = dict.fromkeys(key for key, _ in lines)
    kept = [line for key, line in lines if key in wanted]
    records = {(line['task'], line['split'], line['arm'], line['seed']): line for line in kept}
    splits = dict.fromkeys((line['task'], line['split']) for line in kept)
    return Results(
        name=str(plan.get('name', folder.name)),
        baseline=plan['baseline'],
        tasks=tasks,
        arms=arms,
        seeds=seeds,
        average=plan.get('average', True) is True or len(tasks) == 1,
        text=text,
        sets=sorted(splits, key=lambda rows: tasks.index(rows[0])),  # stable: splits stay in the file's order
        records=records,
        missing=[cell for cell in wanted if cell not in found],
        extra=[cell for cell in found if cell not in wanted],
        repeated=len(kept) - len(records),
    )


def read_plan(path: Path) -> tuple[Mapping[str, Any], str]:
    """Read a ``comparison.yaml``.

    Args:
        path: of the file.

    Returns:
        What it holds, checked, and its text.
    """
    if not path.exists():
        raise UserError(f'{path}: no such file; expected a folder that dhrd compare wrote')
    with user_errors(f'{path}: not YAML', yaml.YAMLError, UnicodeDecodeError):
        text = path.read_text(encoding='utf-8')
        plan = yaml.safe_load(text)
    for key, kind in {'tasks': dict, 'arms': dict, 'seeds': list, 'baseline': str}.items():
        found = plan.get(key) if isinstance(plan, dict) else None
        if not isinstance(found, kind) or not found:
            raise UserError(f'{path}: {key}: found {found!r}; expected a {kind.__name__} that is not empty')
    if plan['baseline'] not in plan['arms']:
        raise UserError(f'{path}: baseline: found {plan["baseline"]!r}; {nearest(plan["baseline"], plan["arms"])}')
    return plan, text


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a ``results.jsonl``.

    Args:
        path: of the file.

    Returns:
        Its lines, checked; none where there is no such file.
    """
    if not path.exists():
        return []
    with user_errors(f'{path}: not UTF-8', UnicodeDecodeError):
        texts = path.read_text(encoding='utf-8').split('\n')
    lines: list[dict[str, Any]] = []
    first: dict[Rows, tuple[int, dict[str, Any]]] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        line = _read_line(text, f'{path}, line {number}')
        before, expected = first.setdefault((line['task'], line['split']), (number, line))
        for key in ROWS:
            if line[key] != expected[key]:
                raise UserError(
                    f'{path}, line {number}: {key}: differs from line {before}, also {line["task"]} {line["split"]}'
                    f'{_where(line[key], expected[key])}; expected the same rows in all cells of a task'
                )
        lines.append(line)
    return lines


def _where(found: Sequence[Any], expected: Sequence[Any]) -> str:
    if len(found) != len(expected):
        return f', {len(found)} entries against {len(expected)}'
    index = next(i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1])
    return f' at entry {index}, {found[index]!r} against {expected[index]!r}'


def _read_line(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f'{where}: not JSON: {error}; expected one object to a line') from None
    for key, kind in KINDS.items():
        found = line.get(key) if isinstance(line, dict) else None
        if not isinstance(found, kind) or isinstance(found, bool):
            expected = 'a number' if isinstance(kind, tuple) else kind.__name__
            raise UserError(f'{where}: {key}: found {str(found)[:60]!r}; expected {expected}')
    for complaint in _complaints(line):
        raise UserError(f'{where}: {complaint}')
    return line


def _complaints(line: Mapping[str, Any]) -> Iterator[str]:
    rows, names, metrics, groups = len(line['ids']), line['label_names'], line['task_metrics'], line['groups']
    if not rows:
        yield 'ids: found no rows; expected one at least'
    for key in ('labels', 'predictions', 'groups'):
        if len(line[key]) != rows:
            yield f'{key}: found {len(line[key])}; expected {rows}, one for each id'
    for key in ('labels', 'predictions'):
        for index, value in enumerate(line[key]):
            if type(value) is not int or not 0 <= value < len(names):
                yield f'{key}: found {value!r} at {index}; expected 0 to {len(names) - 1}'
    if None in groups and any(group is not None for group in groups):
        yield 'groups: found rows with a group and rows without; expected all or none'
    if not metrics:
        yield f'task_metrics: found none; expected some of {", ".join(METRICS)}'
    for name in metrics:
        if name not in METRICS:
            yield f'task_metrics: found {name!r}; {nearest(name, METRICS)}'
    if 'em' in metrics and None in groups:
        yield 'groups: found rows without a group; exact match needs one for each'
    if 'f1a' in metrics and len(names) != 2:
        yield f'label_names: found {len(names)}; f1a needs 2'
    for name, points in line['series'].items():
        if not isinstance(points, list) or any(not isinstance(point, list) or len(point) != 2 for point in points):
            yield f'series: {name}: expected a list of [step, value]'
