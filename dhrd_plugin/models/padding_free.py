"""Rows without their padding: the real tokens of a batch as one sequence, through a decoder that keeps rows apart.

The name is TRL's, the layout that of transformers' ``DataCollatorWithFlattening``. Every layer but attention
works on single tokens. Attention takes each row by itself, causally and without a mask: on a GPU, in half precision,
all rows in one call of the flash attention that torch brings; elsewhere one after the other through
``scaled_dot_product_attention``. A block-diagonal mask over the whole sequence would cost its square.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dhrd_plugin.errors import UserError
from dhrd_plugin.models import heads
from dhrd_plugin.models.extent import Extent
from dhrd_plugin.models.probe import HALF, decoder_of, distance, probe_rows, running, tolerance

ATTENTION = 'padding_free'  # its name among transformers' attention functions
_HALVES = (torch.bfloat16, torch.float16)
# What configs and layers call the number of tokens that attention sees, and how many it sees in the probe.
_WINDOWS = ('sliding_window', 'attention_chunk_size')
_SHORT = HALF - 1


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' ``sdpa``, or of each row by itself.

    Args:
        module: the attention layer.
        query: [1, heads, T, D], the rows one after the other.
        key: [1, key-value heads, T, D].
        value: as ``key``.
        attention_mask: int32 [1, 1, S, B + 1] of :func:`last_hidden_state`, where each row begins and the last one
            ends, S the longest row; anything else is a mask for ``sdpa``.
        dropout: of the attention weights. Default: 0.
        scaling: of the products. Default: that of ``sdpa``.
        **kwargs: for ``sdpa``.

    Returns:
        [1, T, heads, D], and no weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    window, offsets = kwargs.get('sliding_window'), attention_mask[0, 0, 0]
    if one_kernel(query, value):
        return _flash(query, key, value, offsets, attention_mask.shape[2], dropout, scaling, window), None
    return _row_by_row(module, query, key, value, offsets, dropout, scaling, window), None


@torch.compiler.disable  # compiled, every batch of other lengths would be a graph of its own
def _row_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[1, T, heads, D] of all rows, each by itself."""
    lengths = offsets.diff().tolist()
    rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)))
    outputs = []
    for length, row in zip(lengths, rows):
        if not length:
            continue
        mask = None if window is None or length <= window else _band(length, window, query.device)
        options = {'dropout': dropout, 'scaling': scaling, 'is_causal': mask is None}
        outputs.append(sdpa_attention_forward(module, *row, mask, **options)[0])  # pyright: ignore
    return torch.cat(outputs, dim=1)


def one_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention takes such states [1, heads, T, D], on their device and in their precision."""
    size = query.shape[-1]
    if not query.is_cuda or torch.cuda.get_device_properties(query.device).major < 8:  # the kernel is Ampere's
        return False
    return _precision(query) in _HALVES and size == value.shape[-1] and size % 8 == 0 and size <= 256


def _precision(states: Tensor) -> torch.dtype:
    """In which attention runs: under autocast its, also where norms and rotations have made the states fp32."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[1, T, heads, D] of all rows; the operator behind ``torch.nn.attention.varlen``, which torch 2.7 has not yet."""
    dtype = _precision(query)
    states = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    seen = {} if window is None else {'window_size_left': window - 1, 'window_size_right': 0}
    flash: Any = torch.ops.aten._flash_attention_forward
    return flash(*states, offsets, offsets, longest, longest, dropout, True, False, scale=scaling, **seen)[0][None]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, length, length], ``True`` where a token sees another: itself and those before it in the window."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return (ones.tril() & ones.triu(1 - window))[None, None]


def register() -> None:
    """Register :func:`attention` with transformers, with the masks of ``sdpa`` for padded batches."""
    AttentionInterface.register(ATTENTION, attention)
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError:  # before 4.53 each model makes its own masks
        return
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_padding_free(causal_lm: PreTrainedModel) -> int | None:
    """Give a decoder the attention that keeps rows apart, and see in a few tokens that it does.

    Args:
        causal_lm: changed in place, the name of its attention function only.

    Returns:
        The tokens of the longest row that may run so; ``None`` where any may.

    Raises:
        UserError: rows that run together are not what they are alone, as where other layers than attention mix
            tokens, or attention does not go through transformers' attention interface.
    """
    config = causal_lm.config
    if config._attn_implementation not in ('sdpa', ATTENTION):
        raise UserError(
            f'model.padding_free: found true, but its attn_implementation is {config._attn_implementation}, not sdpa; '
            'expected false'
        )
    register()
    config._attn_implementation = ATTENTION
    with running(causal_lm, type(causal_lm).__name__) as runs:
        if not runs:
            return _window(config)
        error = _error(causal_lm)
        if error is not None:
            config._attn_implementation = 'sdpa'
            raise UserError(
                f'model.padding_free: found true, but {error} where rows of a {config.model_type} run together; '
                'expected false'
            )
        longest = _window(config)
        with _short_windows(causal_lm):
            return None if _error(causal_lm) is None else longest


def _error(causal_lm: PreTrainedModel) -> str | None:
    """What is wrong with states of rows that run together; None if they are those of the rows alone."""
    ids, mask = (rows[:3] for rows in probe_rows(causal_lm))  # not the one that is padded on the left
    decoder = decoder_of(causal_lm)
    alone = heads.last_hidden_state(decoder, ids, mask)
    try:
        together = last_hidden_state(decoder, ids, mask)
    except Exception as error:
        return f'{type(error).__name__} is raised'
    real = mask.bool()
    far = distance(together[real].float(), alone[real].float(), alone[0].float())
    return None if far <= tolerance(alone) else 'the states differ'


def _window(config: PretrainedConfig) -> int | None:
    """The tokens that an attention layer sees, by the config; ``None`` for all."""
    return min((size for name in _WINDOWS if (size := getattr(config, name, None))), default=None)


@contextmanager
def _short_windows(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Windows that are shorter than the rows of the probe, in the config and in the layers; then as they were."""
    places = [(place, name) for place in (causal_lm.config, *causal_lm.modules()) for name in _WINDOWS]
    before = [(*place, size) for place in places if isinstance(size := getattr(*place, None), int)]
    for place, name, _ in before:
        setattr(place, name, _SHORT)
    try:
        yield
    finally:
        for place, name, size in before:
            setattr(place, name, size)


def last_hidden_state(
    backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor, extent: Extent | None = None
) -> Tensor:
    """Compute [B, S, H] states of a decoder, after the final norm; 0 where ``attention_mask`` [B, S] is 0.

    Args:
        backbone: a decoder whose attention is :func:`attention`.
        input_ids: [B, S].
        attention_mask: [B, S], 1 for real tokens.
        extent: of the batch. Default: read from the mask, for which the host waits for a GPU.
    """
    extent = extent or Extent.read(attention_mask)
    offsets = nn.functional.pad(attention_mask.sum(1).cumsum(0), (1, 0)).int()
    flat = torch.nonzero_static(attention_mask.flatten(), size=extent.tokens).squeeze(1)
    position_ids = heads.positions(attention_mask).flatten()[flat]
    hidden = backbone(
        input_ids=input_ids.flatten()[flat][None],
        attention_mask=offsets.expand(1, 1, extent.longest, -1),  # a mask's shape, in which the host reads the longest
        position_ids=position_ids[None],
        use_cache=False,
    )[0][0]
    states = hidden.new_zeros(attention_mask.numel(), hidden.shape[-1]).index_copy(0, flat, hidden)
    return states.view(*attention_mask.shape, -1)
