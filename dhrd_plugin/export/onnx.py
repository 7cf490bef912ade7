"""The slim classifier for ONNX Runtime."""

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from dhrd_plugin.errors import UserError
from dhrd_plugin.export.probe import TOLERANCE, ask, difference, probe_rows
from dhrd_plugin.models.build import load_slim_config
from dhrd_plugin.models.heads import decoder_inputs, last_real_index, pool
from dhrd_plugin.models.slim import SlimClassifier
from dhrd_plugin.models.versions import pad_token_of, turning_rope

NAME = 'model.onnx'
KINDS = ('fp32', 'int8')
OPSET = 17


class _Logits(nn.Module):
    """The classifier with its causal mask written out: transformers builds one that cannot be traced."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = _causal_mask(attention_mask)
        model = self.model
        if not isinstance(model, SlimClassifier):
            return model(input_ids=input_ids, attention_mask=mask).logits
        inputs = {**decoder_inputs(model.backbone, input_ids, attention_mask), 'attention_mask': mask}
        hidden = model.backbone(**inputs)[0]
        pooled = pool(hidden, attention_mask, last_real_index(attention_mask), model.config.pooling)
        return model.classifier(pooled)


def _causal_mask(attention_mask: Tensor) -> Tensor:
    """[B, 1, S, S] fp32 to add to the attention scores, from [B, S]: 0 where a token is seen, else very negative."""
    positions = attention_mask.cumsum(-1) * 0 + torch.arange(attention_mask.shape[1])
    seen = (positions[:, None, :] <= positions[:, :, None]) & attention_mask[:, None, :].bool()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def check_onnx(key: str, value: bool | str | None) -> str | None:
    """Check what ONNX file is asked for, and that the packages that write it are installed.

    Args:
        key: what asks for the file, for the message.
        value: one of ``KINDS``; ``True`` is ``'fp32'``, ``False`` and ``None`` are none.

    Returns:
        One of ``KINDS``, or ``None``.

    Raises:
        UserError: ``value`` is something else, or a package is missing.
    """
    if not value:
        return None
    if value is not True and value not in KINDS:
        raise UserError(f"{key}: found {value!r}; expected true (fp32), 'fp32' or 'int8'")
    needed = ['onnx', *(['onnxruntime', 'onnx_ir'] if value == 'int8' else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{key}: the package {missing[0]} is not installed; pip install 'dhrd-plugin[onnx]'")
    return 'fp32' if value is True else value


def write_onnx(model: PreTrainedModel, path: str | Path) -> None:
    """Write a classifier as an ONNX file: ``input_ids``, ``attention_mask`` [B, S] int64 to ``logits`` [B, K] fp32.

    Args:
        model: a slim classifier, in fp32, with eager attention.
        path: the file to write; weights of more than 2 GB lie beside it, in ``PATH.data``.

    Raises:
        UserError: a model as which the file would not answer for texts that are longer than those it is made with.
    """
    config = getattr(model.config, 'backbone', model.config).get_text_config()
    if getattr(config, 'sliding_window', None) and getattr(config, 'use_sliding_window', True):
        raise UserError(f'{type(config).__name__}: found a sliding window; expected plain causal attention')
    if rope := turning_rope(config):
        raise UserError(f'{type(config).__name__}: found rope_type {rope[1]}; expected one for all lengths alike')
    ids = torch.arange(6).view(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # the tracer's, about shapes that are not traced as constants
        torch.onnx.export(
            _Logits(model.eval()),
            (ids, mask),
            str(Path(scratch) / path.name),
            input_names=['input_ids', 'attention_mask'],
            output_names=['logits'],
            dynamic_axes={
                'input_ids': {0: 'batch', 1: 'length'},
                'attention_mask': {0: 'batch', 1: 'length'},
                'logits': {0: 'batch'},
            },
            opset_version=OPSET,
            dynamo=False,  # the tracer's mask is written out above
        )
        _move(Path(scratch) / path.name, path)


def _move(made: Path, path: Path) -> None:
    """Move an ONNX file; weights beside it, each in a file with a name of its own, become one file, ``PATH.data``."""
    if len([*made.parent.iterdir()]) == 1:
        os.replace(made, path)
        return
    import onnx  # of the extra of that name

    onnx.save_model(onnx.load(made), path, save_as_external_data=True, location=f'{path.name}.data')


def check_answers(model: PreTrainedModel, path: str | Path) -> None:
    """Hold an ONNX file against the model that it was written from, where ONNX Runtime is installed.

    Args:
        model: of :func:`write_onnx`.
        path: the file.

    Raises:
        UserError: it differs, on rows of several lengths in one batch or on a row alone.
    """
    if importlib.util.find_spec('onnxruntime') is None:
        return
    session = _session(path)
    batch = made_rows(model)
    for inputs in (batch, {name: value[-1:, :4] for name, value in batch.items()}):
        flaw = difference(_run(session, **inputs), ask(model, inputs), TOLERANCE)
        if flaw is not None:
            raise UserError(f'{type(model).__name__}: {flaw}')


def made_rows(model: PreTrainedModel) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, [B, S], of several lengths; one ends in the pad token."""
    vocabulary = len(model.get_input_embeddings().weight)  # pyright: ignore
    return probe_rows(None, vocabulary, pad_token_of(model.config), pad_last=True)


def _session(path: str | Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as OMP_NUM_THREADS or a launcher says
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def _run(session: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    inputs = {'input_ids': input_ids.numpy(), 'attention_mask': attention_mask.numpy()}
    return torch.from_numpy(session.run(None, inputs)[0])


class OnnxClassifier:
    """A file of :func:`write_onnx`, also one with int8 weights, called like the Hugging Face classifier that it was.

    Args:
        path: the file.
        folder: with its ``config.json``. Default: that of ``path``.
    """

    device = torch.device('cpu')

    def __init__(self, path: str | Path, folder: str | Path | None = None):
        if importlib.util.find_spec('onnxruntime') is None:
            raise UserError(f"{path}: onnxruntime is not installed; pip install 'dhrd-plugin[onnx]'")
        self.session = _session(path)
        self.threads = self.session.get_session_options().intra_op_num_threads
        self.kind = 'int8' if 'int8' in Path(path).name else 'fp32'
        self.config = load_slim_config(Path(path).parent if folder is None else folder)
        given, wanted = {item.name for item in self.session.get_inputs()}, {'input_ids', 'attention_mask'}
        (logits, *_) = self.session.get_outputs()
        if given != wanted or logits.shape[1:] != [self.config.num_labels]:
            raise UserError(
                f'{path}: found inputs {sorted(given)} and an output of {logits.shape}; expected {sorted(wanted)} and '
                f'the {self.config.num_labels} classes of the config.json beside it'
            )

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Compute [B, K] logits from [B, S] token ids."""
        return SequenceClassifierOutput(logits=_run(self.session, input_ids, attention_mask))  # pyright: ignore
