"""The slim classifier for ONNX Runtime with int8 weights, and how far its answers lie from those of fp32."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dhrd_plugin.errors import UserError
from dhrd_plugin.export.onnx import OnnxClassifier
from dhrd_plugin.losses import IGNORE_INDEX
from dhrd_plugin.models.heads import upto
from dhrd_plugin.problem_type import decide, is_known, is_multi_label, to_probabilities

NAME = 'model-int8.onnx'
ROWS = 128  # that the two are compared on
_BATCH = 16
_BLOCK = 128  # weights to a scale
_INT8_INPUTS = 4  # onnxruntime's accuracy_level
_LARGEST = 2**31  # bytes of one file, by protobuf
Row = tuple[Tensor, Tensor]  # token ids [S], and the class or IGNORE_INDEX; of a multi-label task K zeros and ones


@dataclass
class Difference:
    """How the int8 file answers beside the fp32 one."""

    rows: int  # their number
    rows_of: str  # what they are of
    same: float  # share of equal labels
    apart: float  # largest difference of a probability
    accuracy: tuple[float, float] | None  # of fp32 and int8, where the classes are known


def write_int8(path: str | Path, int8: str | Path) -> None:
    """Write an ONNX file again with int8 weights, a scale for each block of them.

    As it runs, inputs of products become int8 too, with a scale for each block of each token: one for the whole batch,
    as of onnxruntime's ``quantize_dynamic``, is spoilt by the few huge values that decoders have. Only products with
    weights become int8: embeddings, attention scores and norms stay fp32.

    Args:
        path: of :func:`~dhrd_plugin.export.onnx.write_onnx`, in a folder with nothing but its weights.
        int8: the file to write; weights of more than 2 GB lie beside it.
    """
    size = sum(file.stat().st_size for file in Path(path).parent.iterdir())
    with _quiet():
        # Imported here: it is of the extra `onnx`, and sets up logging.
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, accuracy_level=_INT8_INPUTS, bits=8)
        quantizer = MatMulNBitsQuantizer(str(path), algo_config=config)
        found: Any = quantizer.model
        found.replace_gemm_with_matmul()
        quantizer.process()
        found = quantizer.model
        found.save_model_to_file(str(int8), size >= _LARGEST)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line for each node of the graph; the root logger is left as it was."""
    root = logging.getLogger()
    before, level, handlers = root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        root.setLevel(level)
        root.handlers[:] = handlers


def rows_of(batch: Mapping[str, Any]) -> list[Row]:
    """The inputs of a batch of an evaluation, without padding and reasoning, and their classes."""
    mask = batch['attention_mask'].bool()
    if 'pool_index' in batch:
        mask = mask & upto(mask, batch['pool_index'])
    return [
        (ids[seen].cpu(), torch.as_tensor(label).cpu())
        for ids, seen, label in zip(batch['input_ids'], mask, batch['labels'], strict=True)
    ]


def compare(fp32: OnnxClassifier, int8: OnnxClassifier, rows: Sequence[Row], rows_of: str) -> Difference:
    """Ask both files the same rows.

    Args:
        fp32: the file that ``int8`` was made of.
        int8: of :func:`write_int8`.
        rows: one or more.
        rows_of: what they are of, for the card.

    Raises:
        UserError: int8 answers with something that is not finite.
    """
    first, second = (_ask(model, [ids for ids, _ in rows]) for model in (fp32, int8))
    if not second.isfinite().all():
        raise UserError('int8: found probabilities that are not finite')
    labels = torch.stack([label for _, label in rows])
    known, several = is_known(labels, IGNORE_INDEX), is_multi_label(fp32.config)
    found = [decide(part, several) for part in (first, second)]
    right = [float(_alike(answer, labels)[known].float().mean()) for answer in found]
    return Difference(
        len(rows),
        rows_of,
        float(_alike(*found).float().mean()),
        float((first - second).abs().max()),
        (right[0], right[1]) if known.any() else None,
    )


def _alike(one: Tensor, other: Tensor) -> Tensor:
    """[N] whether two answers to a row are the same."""
    return (one == other).reshape(len(one), -1).all(-1)


def _ask(model: OnnxClassifier, rows: Sequence[Tensor]) -> Tensor:
    """[N, K] probabilities."""
    parts = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    masks = [pad_sequence([torch.ones_like(ids) for ids in part], True) for part in parts]
    pad = model.config.pad_token_id or 0
    logits = [model(pad_sequence(list(part), True, pad), mask).logits for part, mask in zip(parts, masks, strict=True)]
    return to_probabilities(torch.cat(logits), is_multi_label(model.config))  # pyright: ignore
