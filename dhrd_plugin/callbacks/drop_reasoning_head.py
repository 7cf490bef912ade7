"""Exports the slim classifier when the fit ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dhrd_plugin.errors import UserError
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.export import write_slim

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_NETWORK = 'model.'  # the network's name inside ComposerDualHeadClassifier


def gather_network_state(model: nn.Module) -> dict[str, Tensor]:
    """The network's whole state on the CPU of rank 0; empty elsewhere. Every rank must call it.

    Works for one process, DDP and FSDP alike. In one process the tensors are the live ones.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {
        name.removeprefix(_NETWORK): value
        for name, value in state.items()
        if name.startswith(_NETWORK) and isinstance(value, Tensor)
    }


def on_rank_zero(work: Callable[[], Any]) -> None:
    """Run ``work`` on rank 0 while the others wait; if it fails there, every rank fails.

    Raises:
        RuntimeError: on every rank, with rank 0's error.
    """
    error: list[Exception | None] = [None]
    if dist.get_global_rank() == 0:
        try:
            work()
        except Exception as caught:
            error = [caught]
    message = [error[0] and f'{type(error[0]).__name__}: {error[0]}']
    dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise RuntimeError(f'rank 0 failed: {message[0]}') from error[0]


class DropReasoningHead(Callback):
    """Writes the slim classifier at the fit's end: backbone, classification head, tokenizer.

    The live model is left as it is: it can go on training, be evaluated and be saved. The folder
    holds safetensors and appears whole or not at all.

    Args:
        output_dir: the folder to write.
        dtype: ``'fp32'``, ``'bf16'`` or ``'fp16'``. Default: as trained.

    Raises:
        UserError: an unknown ``dtype``.
    """

    def __init__(self, output_dir: str, dtype: str | None = None):
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f'drop_reasoning_head.dtype: found {dtype!r}; expected one of {list(DTYPES)}')
        self.output_dir = Path(output_dir)
        self.dtype = None if dtype is None else DTYPES[dtype]

    def fit_end(self, state: State, logger: Logger) -> None:
        """Export."""
        del logger
        model = getattr(state.model, 'module', state.model)
        if not isinstance(model, ComposerDualHeadClassifier):
            raise UserError(
                f'drop_reasoning_head: found a model of type {type(model).__name__}; '
                'expected a ComposerDualHeadClassifier'
            )
        weights = gather_network_state(state.model)
        on_rank_zero(lambda: write_slim(model.get_metadata(), weights, self.output_dir, self.dtype))
