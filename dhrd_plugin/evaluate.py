"""How good a classifier is on rows with labels: its metrics, class by class, and how far to trust what it claims."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassPrecision,
    MulticlassRecall,
)
from transformers import AutoTokenizer
from transformers.utils import logging

from dhrd_plugin.cli import run
from dhrd_plugin.data.inspection import read_shards
from dhrd_plugin.data.remote import is_remote
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.data.triplets import Triplet, read_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.files import write_bytes, write_json
from dhrd_plugin.metrics import build_metrics
from dhrd_plugin.models.load import load_slim
from dhrd_plugin.models.onnx import OnnxClassifier
from dhrd_plugin.predict import predict

BINS = 15  # of the calibration error and the reliability curve
HERE: dict[str, Any] = {'sync_on_compute': False}  # a rank that reports has the rows of all


@dataclass(frozen=True)
class Classifier:
    """Anything that turns texts into class probabilities.

    Attributes:
        model: a Hugging Face classifier, or an ONNX file that looks like one.
        tokenizer: its tokenizer.
        label_names: the K class names, in the order of the logits.
        task: the template that was stored with it, if one was.
    """

    model: Any
    tokenizer: Any
    label_names: list[str]
    task: Mapping[str, Any] | None


@contextmanager
def open_classifier(place: str) -> Iterator[Classifier]:
    """A slim export, another Hugging Face classifier, an ONNX file, or a Composer checkpoint.

    Args:
        place: a folder with ``config.json``; a ``.onnx`` file in such a folder; a checkpoint, full or
            sharded, here or in an object store.

    Raises:
        UserError: it is none of these.
    """
    if is_checkpoint(place):
        from dhrd_plugin.export import export_checkpoint

        with tempfile.TemporaryDirectory() as scratch:
            yield _from_folder(export_checkpoint(place, Path(scratch) / 'slim'))
    elif place.endswith('.onnx') and Path(place).is_file():
        yield _from_folder(Path(place).parent, onnx=Path(place))
    elif (Path(place) / 'config.json').is_file():
        yield _from_folder(Path(place))
    else:
        raise UserError(f'{place}: expected a folder with config.json, a .onnx file or a Composer checkpoint')


def is_checkpoint(place: str) -> bool:
    """Whether a place looks like a checkpoint of Composer."""
    return is_remote(place) or (Path(place) / '.metadata').is_file() or (place.endswith('.pt') and Path(place).exists())


def _from_folder(folder: Path, onnx: Path | None = None) -> Classifier:
    if not (folder / 'config.json').is_file():
        raise UserError(f'{folder}: no config.json beside {onnx}; expected the folder that it was exported to')
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    model = load_slim(folder) if onnx is None else OnnxClassifier(onnx)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = config.get('id2label') or {str(i): f'LABEL_{i}' for i in range(model.config.num_labels)}
    return Classifier(model, tokenizer, [names[key] for key in sorted(names, key=int)], _task_of(config))


def _task_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return (config.get('dhrd') or {}).get('task')


def read_data(place: str, task: Task, split: str | None = None) -> list[Triplet]:
    """The rows of a file, a task's folder, the hub, or a set of shards, here or in an object store."""
    if is_remote(place) or (Path(place) / 'index.json').is_file():
        return [row for _, rows in read_shards(place) for row in rows]
    return list(read_triplets(place, task, split=split))


def predict_rows(classifier: Classifier, rows: Sequence[Triplet], task: Task, batch_size: int = 32) -> Tensor:
    """[N, K] probabilities in the order of the task's labels; the ranks share the rows, each of which is read once.

    Raises:
        UserError: the classifier's labels are not the task's.
    """
    from composer.utils import dist

    order = label_order(classifier.label_names, task.label_names)
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    texts = [row['input_text'] for row in rows[rank::ranks]]
    mine = predict(classifier.model, classifier.tokenizer, texts, batch_size) if texts else torch.zeros(0, len(order))
    probabilities = torch.zeros(len(rows), len(order))
    for index, part in enumerate(dist.all_gather_object(mine)):
        probabilities[index::ranks] = part[:, order] if len(part) else part
    return probabilities


def label_order(found: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where each of the task's labels stands among a classifier's.

    Raises:
        UserError: they are not the same labels.
    """
    if list(found) == [f'LABEL_{i}' for i in range(len(wanted))]:  # named by nobody
        return list(range(len(wanted)))
    if sorted(found) != sorted(wanted):
        raise UserError(f"labels: the classifier has {list(found)}; expected the task's {list(wanted)}")
    return [list(found).index(name) for name in wanted]


# ------------------------------------------------------------------------------------ the report


def evaluate(probabilities: Tensor, rows: Sequence[Triplet], task: Task) -> dict[str, Any]:
    """Everything that is reported, as plain data.

    Args:
        probabilities: [N, K], in the order of the task's labels.
        rows: N rows with labels.
        task: names the metrics.

    Returns:
        ``rows``; ``metrics``, the task's own (PAPER, Table 4), accuracy and macro-F1; ``classes`` with precision,
        recall and support of each; ``confusion`` [K, K], rows are the true classes; ``calibration``
        with the expected calibration error and, for each of 15 bins of the confidence that has rows, its
        mean, the share that is right, and the count.
    """
    names = list(task.label_names)
    labels = torch.tensor([names.index(row['label']) for row in rows])
    return {
        'rows': len(rows),
        'metrics': _metrics(probabilities, labels, rows, task),
        'classes': _by_class(probabilities, labels, names),
        'confusion': MulticlassConfusionMatrix(len(names), **HERE)(probabilities, labels).tolist(),
        'calibration': {
            'ece': float(MulticlassCalibrationError(len(names), n_bins=BINS, **HERE)(probabilities, labels)),
            'bins': _reliability(probabilities, labels),
        },
    }


def _metrics(probabilities: Tensor, labels: Tensor, rows: Sequence[Triplet], task: Task) -> dict[str, float]:
    names = list(dict.fromkeys([*task.metrics, 'accuracy', 'macro_f1']))
    number = {group: index for index, group in enumerate(dict.fromkeys(row['group'] for row in rows))}
    groups = torch.tensor([number[row['group']] for row in rows])
    found = {}
    for name, metric in zip(names, build_metrics(names, len(task.label_names), **HERE)):
        metric.update(probabilities, labels, *((groups,) if name == 'em' else ()))
        found[name] = float(metric.compute())
    return found


def _by_class(probabilities: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    options: Any = {'num_classes': len(names), 'average': None, **HERE}
    precision = MulticlassPrecision(**options)(probabilities, labels).tolist()
    recall = MulticlassRecall(**options)(probabilities, labels).tolist()
    support = torch.bincount(labels, minlength=len(names)).tolist()
    return {
        name: {'precision': precision[index], 'recall': recall[index], 'support': support[index]}
        for index, name in enumerate(names)
    }


def _reliability(probabilities: Tensor, labels: Tensor) -> list[dict[str, float]]:
    confidence, guess = probabilities.max(-1)
    right = (guess == labels).float()
    number = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    return [
        {
            'confidence': float(confidence[inside].mean()),
            'accuracy': float(right[inside].mean()),
            'rows': int(inside.sum()),
        }
        for inside in (number == index for index in range(BINS))
        if inside.any()
    ]


def describe(report: Mapping[str, Any]) -> str:
    """The report as a table for people."""
    names = list(report['classes'])
    width = max(len(name) for name in (*names, 'calibration error'))
    lines = [f'{name:<{width}}  {value:.4f}' for name, value in report['metrics'].items()]
    lines += [f'{"calibration error":<{width}}  {report["calibration"]["ece"]:.4f}', '']
    lines += [f'{"class":<{width}}  precision  recall  rows  predicted as: {", ".join(names)}']
    for name, counts in zip(names, report['confusion']):
        row = report['classes'][name]
        lines.append(
            f'{name:<{width}}  {row["precision"]:9.4f}  {row["recall"]:6.4f}  {row["support"]:4d}  '
            f'{"  ".join(str(count) for count in counts)}'
        )
    return '\n'.join(lines)


def predictions(probabilities: Tensor, rows: Sequence[Triplet], task: Task) -> Iterator[dict[str, Any]]:
    """One plain row for each row of the data, in its order."""
    names = list(task.label_names)
    for row, values in zip(rows, probabilities.tolist()):
        best = max(range(len(names)), key=values.__getitem__)
        yield {
            'id': row['id'],
            'label': row['label'],
            'prediction': names[best],
            'probabilities': dict(zip(names, values)),
        }


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """``confusion.png`` and ``reliability.png``; needs the extra ``report``."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    names = list(report['classes'])
    figure = Figure(figsize=(1.6 * len(names) + 2.4, 1.3 * len(names) + 2), layout='constrained')
    shown = ConfusionMatrixDisplay(torch.tensor(report['confusion']).numpy(), display_labels=names)
    shown.plot(ax=figure.subplots(), cmap='Blues', colorbar=False)
    figure.savefig(folder / 'confusion.png', dpi=150, bbox_inches='tight')

    bins = report['calibration']['bins']
    figure = Figure(figsize=(4.5, 5), layout='constrained')
    curve, counts = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    curve.plot([0, 1], [0, 1], linestyle=':', color='gray', label='calibrated')
    curve.plot([row['confidence'] for row in bins], [row['accuracy'] for row in bins], marker='o', label='classifier')
    curve.set(ylabel='share that is right', ylim=(0, 1.02))
    curve.set_title(f'calibration error {report["calibration"]["ece"]:.3f}')
    curve.legend()
    counts.bar([row['confidence'] for row in bins], [row['rows'] for row in bins], width=0.8 / BINS)
    counts.set(xlabel='confidence', ylabel='rows', xlim=(0, 1.02))
    figure.savefig(folder / 'reliability.png', dpi=150)


# ----------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """``evaluate.py MODEL_OR_CHECKPOINT DATA``."""
    parser = argparse.ArgumentParser(description='Evaluate a classifier on rows with labels.')
    parser.add_argument('model', help='a slim export, a Hugging Face classifier, a .onnx file, a Composer checkpoint')
    parser.add_argument('data', help='a file, a task folder, hub:, or a set of shards, here or at an address')
    parser.add_argument('--task', help='a shipped task or a template; default: the one stored with the model')
    parser.add_argument('--split', help='of a task folder or a hub data set')
    parser.add_argument('--output', type=Path, help='a folder for report.json, predictions.jsonl and two PNGs')
    parser.add_argument('--batch-size', type=int, default=32)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return run(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> None:
    from composer.utils import dist, get_device

    logging.set_verbosity_error()
    if args.output:
        _check_report_extra()
    dist.initialize_dist(get_device(None))
    with open_classifier(args.model) as classifier:
        spec = args.task or classifier.task
        if spec is None:
            raise UserError(f'--task: missing; {args.model} has none stored with it')
        task = load_task(spec)
        label_order(classifier.label_names, task.label_names)
        rows = read_data(args.data, task, args.split)
        if not rows:
            raise UserError(f'{args.data}: found no rows')
        probabilities = predict_rows(classifier, rows, task, args.batch_size)
    if dist.get_global_rank() == 0:
        report = evaluate(probabilities, rows, task)
        print(describe(report), flush=True)
        if args.output:
            _write(report, predictions(probabilities, rows, task), args.output)


def _check_report_extra() -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(f"--output: {error.name} is not installed; pip install 'dhrd-plugin[report]'") from None


def _write(report: Mapping[str, Any], rows: Iterator[Mapping[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'report.json', report)
    lines = ''.join(f'{json.dumps(row, ensure_ascii=False)}\n' for row in rows)
    write_bytes(folder / 'predictions.jsonl', lines.encode())
    draw(report, folder)
    print(f'report: {folder}')
