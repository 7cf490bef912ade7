"""The weights of the best evaluation so far, in a file beside the export that they will become."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.files import replacing

_KEYS = {'run', 'best', 'metrics', 'held_out', 'weights'}


def best_path(out: str | Path) -> Path:
    """Where the best weights are kept until the export ``out`` is written of them."""
    out = Path(out)
    return out.with_name(f'{out.name}.best.pt')


def is_better(value: float, than: float | None, mode: str) -> bool:
    """Whether a metric's value is better than the best so far; of equal ones the first stays, NaN never is."""
    if math.isnan(value):
        return False
    return than is None or (value > than if mode == 'max' else value < than)


def keep(path: Path, weights: Mapping[str, Tensor], **facts: Any) -> None:
    """Write the weights, and what was measured of them, in the place of those before; whole or not at all.

    Args:
        path: of :func:`best_path`.
        weights: the network's whole state, on the CPU.
        **facts: ``run``, the id of the one that measured, ``best`` (``metric``, ``dataloader_label``, ``value``,
            ``batch``, ``epoch``), ``metrics`` by evaluation set and name, and ``held_out``, logits [N, K] and labels
            [N] to calibrate by, or ``None``.
    """
    with user_errors(path, RuntimeError), replacing(path) as file:
        torch.save({**facts, 'weights': dict(weights)}, file)


def read_kept(path: Path) -> dict[str, Any]:
    """What :func:`keep` wrote; the weights are read as they are used. An older version's is of the ``run`` ``None``.

    Raises:
        UserError: the file is of other making, or damaged.
    """
    try:
        kept = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if isinstance(kept, dict) and set(kept) | {'run'} == _KEYS:
            return {'run': None, **kept}
    except Exception as error:
        raise UserError(_strange(path)) from error
    raise UserError(_strange(path))


def _strange(path: Path) -> str:
    return f'{path}: found something else than the weights of an evaluation; expected no such file, or an earlier one'
