"""Open a classifier, wherever it stands."""

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.data.texts import texts_of
from dhrd_plugin.errors import UserError, about, one_line, user_errors
from dhrd_plugin.export.classify import logits_of_texts
from dhrd_plugin.export.int8 import NAME as INT8
from dhrd_plugin.export.onnx import NAME, OnnxClassifier
from dhrd_plugin.models.build import load_slim
from dhrd_plugin.problem_type import confidence, decide, is_multi_label, to_probabilities
from dhrd_plugin.streams.remote import is_remote

RUNTIMES = ('torch', 'onnx')


@dataclass(frozen=True)
class Classifier:
    """Anything that turns texts into class probabilities.

    Texts are a list of plain texts, which are put into a prompt of one field; or a list of rows, or a pandas
    DataFrame, with the fields of the template that was stored with the classifier, or with ``input_text``.

    Example:
        >>> classifier = load_classifier('runs/tickets/slim')  # doctest: +SKIP
        >>> classifier.predict(['My card was charged twice.'], abstain=0.9)  # doctest: +SKIP
        ['billing']
    """

    model: Any  # a Hugging Face classifier, or an ONNX file that is called like one
    tokenizer: Any  # its tokenizer
    label_names: list[str]  # the K class names, in the order of the logits
    task: Mapping[str, Any] | None  # the template that was stored with it, if one was
    max_seq_len: int | None = None  # of its training, in tokens, if that was stored
    temperature: float | None = None  # that it was calibrated by, if it was

    @cached_property
    def template(self) -> Task | None:
        """The template, as a task."""
        return None if self.task is None else load_task(self.task)

    @property
    def multi_label(self) -> bool:
        """Whether a text has any number of labels."""
        return is_multi_label(self.model.config)

    @property
    def runs_on(self) -> str:
        """What computes, such as ``onnxruntime, 2 threads``, ``torch, cpu`` or ``torch, NVIDIA H100``."""
        if isinstance(self.model, OnnxClassifier):
            int8 = ', int8' * (self.model.kind == 'int8')
            return f'onnxruntime, {self.model.threads} thread{"s" * (self.model.threads > 1)}{int8}'
        device = self.model.device
        return f'torch, {torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}'

    def predict_proba(self, texts: Any, batch_size: int | None = None) -> Tensor:
        """Compute [N, K] probabilities of N texts, fp32, in the order of ``label_names``.

        Raises:
            UserError: a text or row cannot be classified; it is named by its number, from 1.
        """
        found = texts_of(texts, self.template)
        logits = logits_of_texts(self.model, self.tokenizer, found, batch_size, self.max_seq_len)
        return to_probabilities(logits, self.multi_label)

    def predict(self, texts: Any, abstain: float | None = None, batch_size: int | None = None) -> list[Any]:
        """Find the answer to each text, as :meth:`labels_of` has it. See ``predict_proba``."""
        return self.labels_of(self.predict_proba(texts, batch_size), abstain)

    def labels_of(self, probabilities: Tensor, abstain: float | None = None) -> list[Any]:
        """The most probable label of each row of [N, K]; of a multi-label classifier the list of those above one half.

        ``None`` where that label, or any yes or no of the list, is less probable than ``abstain``.
        """
        sure = (confidence(probabilities.double(), self.multi_label) >= (abstain or 0)).tolist()
        found = named(decide(probabilities, self.multi_label), self.label_names)
        return [label if known else None for label, known in zip(found, sure, strict=True)]


def named(found: Tensor, names: Sequence[str]) -> list[Any]:
    """Answers by name: of [N] class indices each a name, of [N, K] each a list of them."""
    if found.ndim == 1:
        return [names[index] for index in found.tolist()]
    return [[name for name, has in zip(names, row, strict=True) if has] for row in found.tolist()]


def runtime_for(runtime: str | None, precision: str) -> str | None:
    """The ``runtime`` of :func:`load_classifier` where nobody named one: ONNX Runtime computes in fp32 alone."""
    return runtime or (None if precision == 'fp32' else 'torch')


def load_classifier(place: str | Path, runtime: str | None = None) -> Classifier:
    """Open a slim export, another Hugging Face classifier, an ONNX file, or a Composer checkpoint.

    Nothing that lies there is run as code.

    Args:
        place: a folder with ``config.json``; a ``.onnx`` file in such a folder; a checkpoint, full or
            sharded, here or in an object store; or ``hub:NAME``, a classifier on the Hugging Face hub.
        runtime: ``'torch'``, or ``'onnx'``, ONNX Runtime on the CPU. Default: ``'onnx'`` where there is no GPU and
            the folder holds ``model.onnx``, or ``model-int8.onnx`` alone, and for a ``.onnx`` file; else
            ``'torch'``.

    Returns:
        The classifier, on this rank's GPU where there is one and torch runs it.

    Raises:
        UserError: it is none of these, or cannot be read, or not by this runtime.
    """
    path = Path(place)
    if str(place).startswith('hub:'):
        return _from_folder(_from_hub(str(place)), place, runtime)
    if _is_checkpoint(place):
        if runtime == 'onnx':
            raise UserError(f'{place}: is a checkpoint, which torch runs; dhrd export --onnx writes an ONNX file')
        # Imported here: an export is opened without it.
        from dhrd_plugin.export.from_checkpoint import export_checkpoint

        with tempfile.TemporaryDirectory() as scratch:
            return _from_folder(export_checkpoint(str(place), Path(scratch) / 'slim'), place, 'torch')
    if path.suffix == '.onnx' and path.is_file():
        if not (path.parent / 'config.json').is_file():
            raise UserError(f'{path.parent}: no config.json beside {path}; expected the folder that it was exported to')
        if runtime == 'torch':
            raise UserError(f'{place}: is an ONNX file, which onnx runs, in fp32; for torch give its folder')
        return _from_folder(path.parent, place, onnx=path)
    if (path / 'config.json').is_file():
        return _from_folder(path, place, runtime)
    raise UserError(f'{place}: expected a folder with config.json, a .onnx file or a Composer checkpoint')


def _is_checkpoint(place: str | Path) -> bool:
    path = Path(place)
    return is_remote(place) or (path / '.metadata').is_file() or (path.suffix == '.pt' and path.exists())


def _from_hub(place: str) -> Path:
    """The folder of what a repository of the hub holds, which its own client keeps."""
    from huggingface_hub import snapshot_download

    with user_errors(f'{place}: cannot be loaded', kind=True):
        kinds = ['*.json', '*.safetensors', '*.txt', '*.model', '*.jinja', f'{NAME}*', f'{INT8}*']
        return Path(snapshot_download(place.removeprefix('hub:'), allow_patterns=kinds))


def _find_onnx(folder: Path, place: str | Path, runtime: str | None) -> Path | None:
    """The ONNX file of an export, where ONNX Runtime is to run it; int8 where it is the only one."""
    path = next((folder / name for name in (NAME, INT8) if (folder / name).is_file()), None)
    if runtime == 'onnx' and path is None:
        raise UserError(f'{place}: holds no {NAME}; dhrd export --onnx writes one')
    by_itself = runtime is None and _device().type == 'cpu' and importlib.util.find_spec('onnxruntime') is not None
    return path if runtime == 'onnx' or by_itself else None


def _from_folder(folder: Path, place: str | Path, runtime: str | None = None, onnx: Path | None = None) -> Classifier:
    onnx = onnx or _find_onnx(folder, place, runtime)
    with user_errors(f'{place}: cannot be loaded'):
        model: Any = load_slim(folder) if onnx is None else OnnxClassifier(onnx)
        model = model.to(_device()) if onnx is None else model
        # The config, which transformers 5 would read as one of another type.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config, trust_remote_code=False)
        names: dict[int, str] = dict(model.config.id2label)
        stored = getattr(model.config, 'dhrd', None) or {}
        temperature = (stored.get('calibration') or {}).get('temperature')
    labels = [names[index] for index in sorted(names)]
    if sorted(names) != list(range(len(names))) or len(set(labels)) < len(labels) or not _are_texts(labels):
        raise UserError(
            f'{place}: config.json: id2label: found {one_line(names)}; expected a name for each class, from 0'
        )
    if (task := stored.get('task')) is not None:
        with about(f'{place}: config.json'):
            load_task(task)
    return Classifier(model, tokenizer, labels, task, stored.get('max_seq_len'), temperature)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device('cpu')
    return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))


def _are_texts(labels: Sequence[Any]) -> bool:
    return all(isinstance(label, str) for label in labels)
