"""What an export has to show before it is published: that it answers as the model does that it was made from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.models.build import load_slim
from dhrd_plugin.models.probe import evaluating
from dhrd_plugin.models.versions import DTYPE
from dhrd_plugin.problem_type import is_multi_label

Inputs = Mapping[str, Tensor]  # input_ids and attention_mask, [B, S]

# How far logits may lie from the model's, as a share of the largest: what the rounding of weights adds up to over
# the layers. A head that was not loaded, or another token pooled, is off by about 1.
TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
TOLERANCE = 1e-4  # of fp32
_TEXTS = ('a', 'is item 3 odd? yes', "Don't  add 1234\n\nlines", '\ue000')  # the last is in no vocabulary
_LENGTHS = (1, 3, 8)
_LONGEST = 12


def ends_in_pad(tokenizer: Any, pad_token_id: int | None) -> bool:
    """Whether the pad token may end an input, as an end of text, as an unknown word, or out of the text itself.

    Args:
        tokenizer: of the export; ``None`` says nothing, so it may.
        pad_token_id: of the config.
    """
    if tokenizer is None or pad_token_id in (None, tokenizer.unk_token_id):
        return True
    pad = tokenizer.convert_ids_to_tokens(pad_token_id)
    texts = [*_TEXTS, f'a{pad}', f'a {pad}']
    return any(ids[-1:] == [pad_token_id] for ids in tokenizer(texts, verbose=False)['input_ids'])


def probe_rows(tokenizer: Any, vocab_size: int, pad_token_id: int | None, pad_last: bool) -> dict[str, Tensor]:
    """Rows of several lengths, padded on the right as an export's tokenizer does.

    Args:
        tokenizer: gives some of the rows; ``None`` gives none.
        vocab_size: V; the other rows are made of ids below it.
        pad_token_id: pads.
        pad_last: whether one of the rows, with its mask, ends in the pad token.

    Returns:
        ``input_ids`` and ``attention_mask``, [B, S].
    """
    pad = pad_token_id or 0
    ids = [i for i in ((31 * n + 11) % vocab_size for n in range(2 * _LONGEST)) if i != pad] or [pad]
    rows = [ids[:length] for length in _LENGTHS]
    if tokenizer is not None:
        rows += [row[-_LONGEST:] for row in _ids(tokenizer) if row and max(row) < vocab_size]
    if pad_last:
        rows.append([*ids[:3], pad])
    longest = max(map(len, rows))
    return {
        'input_ids': torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
        'attention_mask': torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


@torch.no_grad()
def ask(model: nn.Module, inputs: Inputs) -> Tensor:
    """[B, K] logits of a model that takes these inputs, fp32 on the CPU; it is left as it was, in training or not."""
    device = next(model.parameters()).device
    with evaluating(model):
        return model(**{name: value.to(device) for name, value in inputs.items()}).logits.float().cpu()


def tolerance(*models: nn.Module) -> float:
    """How far logits may lie apart, relative to the largest: by the coarsest weights, and where they are."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    allowed = max(TOLERANCES.get(parameter.dtype, TOLERANCE) for parameter in parameters)
    # An accelerator may multiply fp32 in TF32, of fp16's precision.
    return max([allowed, *(TOLERANCES[torch.float16] for p in parameters if p.device.type != 'cpu')])


def difference(found: Tensor, expected: Tensor, allowed: float) -> str | None:
    """How [B, K] logits differ from those that were expected; None if they do not.

    Args:
        found: of the export.
        expected: of the model.
        allowed: see :func:`tolerance`.
    """
    if found.shape != expected.shape:
        return f'found {found.shape[1]} logits; expected {expected.shape[1]}'
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if error <= allowed * scale:  # not so where one of them is NaN
        return None
    return f'its logits differ by {error:.2g} from those of the model, which are up to {scale:.2g}'


def _ids(tokenizer: Any) -> list[list[int]]:
    return tokenizer(list(_TEXTS), verbose=False)['input_ids']


def find_difference(
    folder: Path,
    weights: Sequence[str],
    model: nn.Module,
    inputs: Inputs,
    expected: Tensor,
    tokenizer: Any = None,
    multi_label: bool = False,
) -> str | None:
    """How a written folder, loaded as anybody would, differs from the model; None if it does not.

    Args:
        folder: a slim export; nothing in it is run.
        weights: the names of what was written.
        model: that it was made from.
        inputs: of :func:`probe_rows`.
        expected: [B, K] logits of the model.
        tokenizer: that it was trained with. Default: there is none in the folder.
        multi_label: whether the model gives a row any number of classes. Default: one.
    """
    try:
        with torch.random.fork_rng(devices=[]), user_errors('it cannot be loaded'):
            found = load_slim(folder, **{DTYPE: 'auto'})
            unread = sorted(set(weights) - set(found.state_dict()))
            if unread:
                return f'{type(found).__name__} has no place for {unread[0]}'
            if is_multi_label(found.config) != multi_label:
                return f'its config has problem_type {getattr(found.config, "problem_type", None)}'
            if tokenizer is not None:
                loaded = AutoTokenizer.from_pretrained(folder, config=found.config, trust_remote_code=False)
                if _ids(loaded) != _ids(tokenizer):
                    return f'its tokenizer is loaded as a {type(loaded).__name__}, which makes other tokens of a text'
            return difference(ask(found, inputs), expected, tolerance(found, model))
    except UserError as error:
        return str(error).removeprefix(f'{folder}: ')
