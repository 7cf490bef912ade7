"""Open a classifier, wherever it stands."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dhrd_plugin.errors import UserError, one_line, user_errors
from dhrd_plugin.export.onnx import OnnxClassifier
from dhrd_plugin.models.build import load_slim
from dhrd_plugin.streams.remote import is_remote


@dataclass(frozen=True)
class Classifier:
    """Anything that turns texts into class probabilities."""

    model: Any  # a Hugging Face classifier, or an ONNX file that is called like one
    tokenizer: Any  # its tokenizer
    label_names: list[str]  # the K class names, in the order of the logits
    task: Mapping[str, Any] | None  # the template that was stored with it, if one was
    temperature: float | None = None  # that it was calibrated by, if it was


def open_classifier(place: str | Path) -> Classifier:
    """Open a slim export, another Hugging Face classifier, an ONNX file, or a Composer checkpoint.

    Nothing that lies there is run as code.

    Args:
        place: a folder with ``config.json``; a ``.onnx`` file in such a folder; a checkpoint, full or
            sharded, here or in an object store.

    Returns:
        The classifier, on this rank's GPU where there is one. An ONNX file runs on the CPU.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    path = Path(place)
    if _is_checkpoint(place):
        # Imported here: an export is opened without it.
        from dhrd_plugin.export.from_checkpoint import export_checkpoint

        with tempfile.TemporaryDirectory() as scratch:
            return _from_folder(export_checkpoint(str(place), Path(scratch) / 'slim'), place)
    if path.suffix == '.onnx' and path.is_file():
        if not (path.parent / 'config.json').is_file():
            raise UserError(f'{path.parent}: no config.json beside {path}; expected the folder that it was exported to')
        return _from_folder(path.parent, place, onnx=path)
    if (path / 'config.json').is_file():
        return _from_folder(path, place)
    raise UserError(f'{place}: expected a folder with config.json, a .onnx file or a Composer checkpoint')


def _is_checkpoint(place: str | Path) -> bool:
    path = Path(place)
    return is_remote(place) or (path / '.metadata').is_file() or (path.suffix == '.pt' and path.exists())


def _from_folder(folder: Path, place: str | Path, onnx: Path | None = None) -> Classifier:
    with user_errors(f'{place}: cannot be loaded'):
        model: Any = load_slim(folder).to(_device()) if onnx is None else OnnxClassifier(onnx)
        # The config, which transformers 5 would read as one of another type.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config, trust_remote_code=False)
        names: dict[int, str] = dict(model.config.id2label)
        facts = getattr(model.config, 'dhrd', None) or {}
        temperature = (facts.get('calibration') or {}).get('temperature')
    labels = [names[index] for index in sorted(names)]
    if sorted(names) != list(range(len(names))) or len(set(labels)) < len(labels) or not _are_texts(labels):
        raise UserError(
            f'{place}: config.json: id2label: found {one_line(names)}; expected a name for each class, from 0'
        )
    return Classifier(model, tokenizer, labels, facts.get('task'), temperature)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device('cpu')
    return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))


def _are_texts(labels: Sequence[Any]) -> bool:
    return all(isinstance(label, str) for label in labels)
