"""Evaluate a classifier on rows with labels: its metrics, each class, and how well its probabilities are calibrated."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix, MultilabelConfusionMatrix
from transformers.utils import logging

from dhrd_plugin import files, pictures, ranks
from dhrd_plugin.calibration import BINS, at_temperature, calibration_error, coverage, reliability
from dhrd_plugin.cli import Parser, run
from dhrd_plugin.data.inspect import read_shards
from dhrd_plugin.data.tasks import MULTI_LABEL_METRICS, Task, load_task, named_labels, with_found_labels
from dhrd_plugin.data.texts import Text
from dhrd_plugin.data.triplet import Triplet, counted_as
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.errors import UserError, tell, user_errors
from dhrd_plugin.export.classify import logits_on_ranks
from dhrd_plugin.export.load import Classifier, load_classifier, named, runtime_for
from dhrd_plugin.metrics import build_metrics
from dhrd_plugin.predict import add_speed
from dhrd_plugin.problem_type import MULTI_LABEL, SINGLE_LABEL, decide, each_by_itself, to_probabilities
from dhrd_plugin.streams.index import INDEX
from dhrd_plugin.streams.remote import is_remote

FILES = ('report.json', 'predictions.jsonl', 'confusion.png', 'reliability.png')  # of an evaluation
CONFIDENT = 0.9  # the error of answers that are at least as sure is printed
FEW = 12  # classes, whose confusion has a column each in the table and a number in each cell of the picture
MOST_TICKS = 120  # names beside the picture; of more classes every second is named, and so on
LONGEST_NAME = 40  # of a class, in the table and the picture
HERE: dict[str, Any] = {'sync_on_compute': False}  # the rank that reports has all rows


def report_on(
    model: str | Path,
    data: Sequence[str | Path],
    task: str | None = None,
    split: str | None = None,
    output: str | Path | None = None,
    batch_size: int | None = None,
    precision: str = 'fp32',
    runtime: str | None = None,
    tell_report: Callable[[str], object] = lambda text: None,
) -> dict[str, Any] | None:
    """Evaluate a classifier on rows with labels, as ``dhrd evaluate`` does. Every rank has to call it.

    Args:
        model: see :func:`~dhrd_plugin.export.load.load_classifier`.
        data: where the rows are (:func:`read_data`); several places are read as one set (:func:`_as_one`).
        task: a shipped task or a template. Default: the one stored with the model.
        split: of a task's folder or a hub data set.
        output: a folder for ``report.json``, ``predictions.jsonl`` and two PNGs, which replace those of an earlier
            report when all are finished; what else is there stays. Default: nothing is written.
        batch_size: see :func:`~dhrd_plugin.export.classify.logits_of_texts`.
        precision: likewise. Default: ``'fp32'``.
        runtime: see :func:`~dhrd_plugin.export.load.load_classifier`; ``'torch'`` where another precision is asked for.
        tell_report: gets the text of :func:`describe` before anything is written. Default: nobody does.

    Returns:
        On rank 0 the report of :func:`evaluate`; elsewhere ``None``.

    Raises:
        UserError: the classifier or the rows cannot be read, or do not fit each other; ``output`` cannot be written,
            or has files of these names that are not ours.
    """
    if output:
        pictures.check_extra('--output', 'matplotlib', 'sklearn')
    ranks.initialize()
    if output:
        _check_output(output, {'the model': model, '--task': task, **{f'the data {place}': place for place in data}})
    classifier = load_classifier(model, runtime_for(runtime, precision))
    spec = task or classifier.task
    if spec is None:
        raise UserError(f'--task: missing; {model} has none stored with it')
    template = load_task(spec)
    if not template.labels:  # a template that leaves them to the training rows
        template = with_found_labels(template, named_labels(load_task(classifier.task or spec)).labels, '--task')
    label_order(classifier.label_names, template.label_names)
    _check_kind(classifier, template, model)
    rows = _as_one([_checked(read_data(place, template, split), template, place) for place in data])
    if not rows:
        raise UserError(f'{", ".join(map(str, data))}: found no rows')
    if ranks.rank() == 0:
        tell(f'runs on: {classifier.runs_on}')
    logits = _logits_of(classifier, rows, template, batch_size, precision)
    if ranks.rank() != 0:
        return None
    probabilities = to_probabilities(logits, template.multi_label)
    report = evaluate(probabilities, rows, template, classifier.temperature, logits)
    tell_report(describe(report))
    if output:
        _write(report, predictions(probabilities, rows, template), Path(output))
    return report


def _checked(rows: list[Triplet], task: Task, place: str | Path) -> list[Triplet]:
    """The rows that the metrics count: not those that have only probabilities. Shards may hold any label, or none."""
    rows = [row for row in rows if row['label'] != '' or row['probabilities'] is None]
    for row in rows:
        if isinstance(row['label'], list) != task.multi_label or not task.answers.keys() >= set(counted_as(row)):
            wanted = f'{"a list" if task.multi_label else "one"} of {", ".join(task.label_names)}'
            raise UserError(f'{place}, row {row["id"]}: label: found {row["label"]!r}; expected {wanted}')
        if 'em' in task.metrics and not row['group']:
            raise UserError(f'{place}, row {row["id"]}: group: missing; exact match (em) counts rows by their group')
    return rows


def _as_one(sets: list[list[Triplet]]) -> list[Triplet]:
    """The rows of several places: where two share an id or a group, each of these gets the number of its place."""
    for key in ('id', 'group'):
        found = [{row[key] for row in rows if row[key]} for rows in sets]
        if len(set().union(*found)) < sum(map(len, found)):
            for number, row in ((number, row) for number, rows in enumerate(sets, 1) for row in rows if row[key]):
                row[key] = f'{number}:{row[key]}'
    return [row for rows in sets for row in rows]


def read_data(place: str | Path, task: Task, split: str | None = None) -> list[Triplet]:
    """Read the rows of a file, a task's folder, the hub, or a set of shards, here or in an object store."""
    if is_remote(place) or (Path(place) / INDEX).is_file():
        if split is not None:
            raise UserError(f'{place}: is one set of shards; leave out the split {split!r}')
        return [row for _, rows in read_shards(place) for row in rows]
    return list(read_triplets(str(place), task, split=split))


def _logits_of(
    classifier: Classifier, rows: Sequence[Triplet], task: Task, batch_size: int | None, precision: str
) -> Tensor:
    order = label_order(classifier.label_names, task.label_names)
    texts = [Text(f'row {row["id"]}', row['id'], row['input_text'], row.get('cuttable')) for row in rows]
    limit = classifier.max_seq_len
    return logits_on_ranks(classifier.model, classifier.tokenizer, texts, batch_size, limit, precision)[:, order]


def _check_kind(classifier: Classifier, task: Task, model: str | Path) -> None:
    """Refuse rows of one label where the classifier gives several, and the other way round."""
    if classifier.multi_label != task.multi_label:
        wanted = MULTI_LABEL if classifier.multi_label else SINGLE_LABEL
        found = f'task {task.name}: problem_type: found {task.problem_type}'
        raise UserError(f'{found}; expected {wanted}, that of {model}')


def label_order(found: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """The index of each of the task's labels among a classifier's, which are in the order of its logits."""
    if list(found) == [f'LABEL_{i}' for i in range(len(wanted))]:  # transformers' names where nobody gave any
        return list(range(len(wanted)))
    if sorted(found) != sorted(wanted):
        raise UserError(f"labels: the classifier has {list(found)}; expected the task's {list(wanted)}")
    return [list(found).index(name) for name in wanted]


# ------------------------------------------------------------------------------------ the report


def evaluate(
    probabilities: Tensor,
    rows: Sequence[Triplet],
    task: Task,
    temperature: float | None = None,
    logits: Tensor | None = None,
) -> dict[str, Any]:
    """Make the report, as plain data.

    Args:
        probabilities: [N, K], in the order of the task's labels.
        rows: N rows with labels.
        task: names the metrics.
        temperature: that the classifier's logits were divided by when it was calibrated. Default: it was not.
        logits: [N, K], of the probabilities: of several labels these tell how sure a yes is that fp32 rounds to 1.
            Default: such a yes is taken for certain.

    Returns:
        ``rows``, their number; ``label_names``; ``task_metrics``, the names of the task's own metrics (PAPER, Table
        4); ``metrics``, these, accuracy and macro-F1; ``classes``, precision, recall and support of each;
        ``confusion`` [K, K], rows are the true classes, of several labels [K, 2, 2], each class's no and yes;
        ``calibration``, the expected calibration error and, for each of 15 bins of the confidence that has rows,
        its mean, the accuracy, and the number of rows; of a calibrated classifier also ``before``, its
        ``temperature`` and the error without it; ``coverage``, of :func:`~dhrd_plugin.calibration.coverage`.
    """
    names = list(task.label_names)
    labels = torch.tensor([_target(row, names) for row in rows])
    metrics = _metrics(probabilities, labels, rows, task)
    kind = MultilabelConfusionMatrix if task.multi_label else MulticlassConfusionMatrix
    confusion = kind(len(names), **HERE)(decide(probabilities, task.multi_label).long(), labels)
    if task.multi_label:  # a class's yes or no is what can be trusted, or not
        no = 1 - probabilities if logits is None else to_probabilities(-logits, multi_label=True)
        probabilities, labels = each_by_itself(no, probabilities, labels)
    calibration = {'ece': calibration_error(probabilities, labels), 'bins': reliability(probabilities, labels)}
    if temperature is not None:
        before = calibration_error(at_temperature(probabilities, 1 / temperature), labels)
        calibration['before'] = {'temperature': temperature, 'ece': before}
    return {
        'rows': len(rows),
        'label_names': names,
        'task_metrics': list(task.metrics),
        'metrics': metrics,
        'classes': _by_class(confusion, names),
        'confusion': confusion.tolist(),
        'calibration': calibration,
        'coverage': coverage(probabilities, labels),
    }


def _target(row: Triplet, names: Sequence[str]) -> int | list[int]:
    """The index of a row's class; of several labels a zero or one for each."""
    label = row['label']
    return names.index(label) if isinstance(label, str) else [int(name in label) for name in names]


def _metrics(probabilities: Tensor, labels: Tensor, rows: Sequence[Triplet], task: Task) -> dict[str, float]:
    always = MULTI_LABEL_METRICS if task.multi_label else ('accuracy', 'macro_f1')
    names = list(dict.fromkeys([*task.metrics, *always]))
    index_of = {group: index for index, group in enumerate(dict.fromkeys(row['group'] for row in rows))}
    groups = torch.tensor([index_of[row['group']] for row in rows])
    found = {}
    for name, metric in zip(names, build_metrics(names, len(task.label_names), task.multi_label, **HERE)):
        metric.update(probabilities, labels, *((groups,) if name == 'em' else ()))
        found[name] = float(metric.compute())
    return found


def _by_class(confusion: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    if confusion.ndim == 3:  # of several labels, each with its own
        right, predicted, support = confusion[:, 1, 1], confusion[:, :, 1].sum(1), confusion[:, 1].sum(1)
    else:
        right, predicted, support = confusion.diag(), confusion.sum(0), confusion.sum(1)
    columns = (right / predicted.clamp(min=1)).tolist(), (right / support.clamp(min=1)).tolist(), support.tolist()
    return {name: dict(zip(('precision', 'recall', 'support'), row)) for name, *row in zip(names, *columns)}


def describe(report: Mapping[str, Any]) -> str:
    """Format the report as tables for people."""
    names = report['label_names']
    width = max(len(_short(name)) for name in (*names, 'calibration error'))
    lines = [f'{name:<{width}}  {value:.4f}' for name, value in report['metrics'].items()]
    lines += [f'{"calibration error":<{width}}  {report["calibration"]["ece"]:.4f}{_before(report)}']
    lines += [_confident(report), '']
    several, few = _has_several(report), len(names) <= FEW
    heading = ', '.join(map(_short, names)) if few else 'the three most frequent'
    lines += [f'{"class":<{width}}  precision  recall  rows{"" if several else f"  predicted as: {heading}"}']
    for name, counts in zip(names, report['confusion']):
        row = report['classes'][name]
        line = f'{_short(name):<{width}}  {row["precision"]:9.4f}  {row["recall"]:6.4f}  {row["support"]:4d}'
        guesses = '' if several else '  '.join(map(str, counts)) if few else _most_frequent(names, counts)
        lines.append(f'{line}  {guesses}'.rstrip())
    return '\n'.join(lines)


def _has_several(report: Mapping[str, Any]) -> bool:
    """Whether a report is of rows of several labels."""
    return isinstance(report['confusion'][0][0], list)


def _before(report: Mapping[str, Any]) -> str:
    before = report['calibration'].get('before')
    return '' if before is None else f'  ({before["ece"]:.4f} without the temperature {before["temperature"]:.4f})'


def _confident(report: Mapping[str, Any]) -> str:
    """The error of the answers that are sure, and of how many."""
    row = next(row for row in report['coverage'] if row['confidence'] == CONFIDENT)
    error = 'none' if row['error'] is None else f'{row["error"]:.2%}'
    of = 'decisions, each of a row on a class' if _has_several(report) else 'rows'
    return f'error at confidence of {CONFIDENT:.0%} and more: {error} of {row["rows"]} {of} ({row["share"]:.1%} of all)'


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f'{name[: LONGEST_NAME - 1]}…'


def _most_frequent(names: Sequence[str], counts: Sequence[int]) -> str:
    best = sorted(zip(counts, names), key=lambda pair: -pair[0])[:3]
    return ', '.join(f'{_short(name)} {count}' for count, name in best if count)


def predictions(probabilities: Tensor, rows: Sequence[Triplet], task: Task) -> Iterator[dict[str, Any]]:
    """Yield ``id``, ``group``, ``label``, ``prediction`` and ``probabilities`` (by label) of each row, in its order."""
    names = list(task.label_names)
    found = named(decide(probabilities, task.multi_label), names)
    for row, prediction, values in zip(rows, found, probabilities.tolist()):
        yield {
            'id': row['id'],
            'group': row['group'] or None,
            'label': row['label'],
            'prediction': prediction,
            'probabilities': dict(zip(names, values)),
        }


@pictures.drawing()
def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Draw ``confusion.png`` and ``reliability.png`` into a folder; needs the extra ``report``."""
    from matplotlib.figure import Figure

    drawing = _draw_decisions if _has_several(report) else _draw_confusion
    drawing(report, folder / 'confusion.png')

    bins = report['calibration']['bins']
    figure = Figure(figsize=(9, 5), layout='constrained')
    left, right = figure.subfigures(1, 2)  # pyright: ignore[reportGeneralTypeIssues]
    curve, counts = left.subplots(2, sharex=True, height_ratios=[3, 1])
    curve.plot([0, 1], [0, 1], linestyle=':', color='gray', label='calibrated')
    curve.plot([row['confidence'] for row in bins], [row['accuracy'] for row in bins], marker='o', label='classifier')
    curve.set(ylabel='share that is right', ylim=(0, 1.02))
    curve.set_title(f'calibration error {report["calibration"]["ece"]:.3f}')
    curve.legend()
    counts.bar([row['confidence'] for row in bins], [row['rows'] for row in bins], width=0.8 / BINS)
    counts.set(xlabel='confidence', ylabel='rows', xlim=(0, 1.02))
    _draw_coverage(report['coverage'], right.subplots())
    figure.savefig(folder / 'reliability.png', dpi=150)


def _draw_coverage(rows: Sequence[Mapping[str, Any]], axes: Any) -> None:
    """Draw the error of the rows that are kept over their share, each threshold of the confidence a point."""
    kept = [*{row['share']: row for row in rows if row['rows']}.values()]  # of thresholds that all reach, the highest
    axes.plot([row['share'] for row in kept], [row['error'] for row in kept], marker='o')
    for row in kept:
        axes.annotate(f'{row["confidence"]:g}', (row['share'], row['error']), (4, 4), textcoords='offset points')
    axes.set(xlabel='share of rows of this confidence and more', ylabel='their error', xlim=(0, 1.12))
    axes.set_ylim(bottom=0)
    axes.set_title('coverage and error')


def _draw_confusion(report: Mapping[str, Any], path: Path) -> None:
    """Draw the confusion matrix: of few classes with a number in every cell, of many in colours, at a bounded size."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    names = [_short(name) for name in report['classes']]
    count, few = len(names), len(names) <= FEW
    width, height = (min(1.6 * count + 2.4, 14), min(1.3 * count + 2, 12)) if few else [min(8 + 0.15 * count, 20)] * 2
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots()
    shown = ConfusionMatrixDisplay(torch.tensor(report['confusion']).numpy(), display_labels=names)
    shown.plot(ax=axes, cmap='Blues', colorbar=False, include_values=few, xticks_rotation='horizontal')
    if 6 < count <= FEW:
        axes.tick_params('x', rotation=45)
    if not few:
        figure.colorbar(shown.im_, ax=axes, shrink=0.6, label='rows')
        step = -(-count // MOST_TICKS)
        for axis, rotation in ((axes.xaxis, 90), (axes.yaxis, 0)):
            axis.set_ticks(range(0, count, step), names[::step], rotation=rotation, fontsize=8 if count < 90 else 6)
    figure.savefig(path, dpi=150 if few else 100, bbox_inches='tight')


def _draw_decisions(report: Mapping[str, Any], path: Path) -> None:
    """Draw of each class how often it was found, missed, and seen where it was not; of many classes the first."""
    from matplotlib.figure import Figure

    names = [_short(name) for name in report['classes']][:MOST_TICKS]
    counts = torch.tensor(report['confusion'])[: len(names)]
    figure = Figure(figsize=(9, min(1.5 + 0.35 * len(names), 30)), layout='constrained')
    axes = figure.subplots()
    left = torch.zeros(len(names), dtype=torch.long)
    parts = {'found': counts[:, 1, 1], 'missed': counts[:, 1, 0], 'seen where it was not': counts[:, 0, 1]}
    for name, values in parts.items():
        bars = axes.barh(range(len(names)), values.tolist(), left=left.tolist(), label=name)
        axes.bar_label(bars, [str(value) if value else '' for value in values.tolist()], label_type='center')
        left = left + values
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel='rows')
    figure.legend(loc='outside lower center', ncols=len(parts))
    figure.savefig(path, dpi=150 if len(names) <= FEW else 100)


def _check_output(folder: str | Path, read: Mapping[str, Any]) -> None:
    """Refuse a folder that may not or cannot be written to, on every rank; rank 0 looks, as it writes."""

    def check() -> None:
        files.check_into(folder, '--output')
        earlier = files.has_keys(Path(folder) / 'report.json', 'confusion', 'calibration')
        apart = {name: place for name, place in read.items() if place and not is_remote(place)}
        for name in FILES:
            files.check_file(Path(folder) / name, '--output', 'a report of ours', lambda _: earlier, apart)

    ranks.from_rank_zero(check)


def _write(report: Mapping[str, Any], rows: Iterator[Mapping[str, Any]], folder: Path) -> None:
    with user_errors(folder, OSError), files.filling(folder) as fresh:
        files.write_json(fresh / 'report.json', report)
        files.write_bytes(fresh / 'predictions.jsonl', b''.join(map(files.json_line, rows)))
        draw(report, fresh)


# ----------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd evaluate MODEL DATA [DATA ...]``; returns the exit status."""
    return run(lambda: _evaluate(_parse_args(argv)))


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog='dhrd evaluate', description='Evaluate a classifier on rows with labels.')
    parser.add_argument('model', help='a slim export, a Hugging Face classifier, a .onnx file, a Composer checkpoint')
    parser.add_argument(
        'data',
        nargs='+',
        help='a file, a task folder, hub:, or a set of shards, here or at an address; read as one set',
    )
    parser.add_argument('--task', help='a shipped task or a template; default: the one stored with the model')
    parser.add_argument('--split', help='of a task folder or a hub data set')
    parser.add_argument('--output', type=Path, help='a folder for report.json, predictions.jsonl and two PNGs')
    add_speed(parser)
    return parser.parse_args(argv)


def _evaluate(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    report = report_on(**vars(args), tell_report=print)
    if report is not None and args.output:
        print(f'report: {args.output}')
