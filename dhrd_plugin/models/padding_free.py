"""Rows without their padding: the real tokens of a batch as one sequence, through a decoder that keeps rows apart.

The name is TRL's, the layout that of transformers' ``DataCollatorWithFlattening``. Every layer but attention
works on single tokens; attention takes each row by itself, causally and without a mask, which is the fast way
of torch's ``scaled_dot_product_attention``. A block-diagonal mask over the whole sequence would cost its square.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dhrd_plugin.errors import UserError

ATTENTION = 'padding_free'  # its name among transformers' attention functions
# Decoders whose attention alone mixes tokens, held against their padded states in tests/models/test_padding_free.py.
PROVED = ('gpt2', 'llama', 'mistral', 'qwen2', 'qwen3')


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
    """Attention of transformers' kind ``sdpa``, or of each row by itself.

    Args:
        module: the attention layer.
        query: [1, heads, T, D], the rows one after the other.
        key: [1, key-value heads, T, D].
        value: as ``key``.
        attention_mask: [1, 1, 1, B] whole numbers, the lengths of the rows; anything else is a mask for ``sdpa``.
        dropout: of the attention weights.
        scaling: of the products.
        **kwargs: for ``sdpa``.

    Returns:
        [1, T, heads, D], and no weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    lengths = attention_mask.flatten().tolist()
    rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)))
    outputs = [
        sdpa_attention_forward(module, *row, None, dropout, scaling, is_causal=True)[0]  # pyright: ignore
        for row in rows
    ]
    return torch.cat(outputs, dim=1), None


def register() -> None:
    """Make the function known to transformers, with the masks of ``sdpa`` for batches that are padded."""
    AttentionInterface.register(ATTENTION, attention)
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError:  # before 4.53 each model makes its own masks
        return
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def why_not(config: PretrainedConfig) -> str | None:
    """The reason for which a decoder cannot run without padding; ``None`` where it can."""
    if config.model_type not in PROVED:
        return f'{config.model_type} is not among {", ".join(PROVED)}'
    if config._attn_implementation not in ('sdpa', ATTENTION):
        return f'its attn_implementation is {config._attn_implementation}, not sdpa'
    return None


def use_padding_free(causal_lm: PreTrainedModel) -> None:
    """Give a decoder the attention that keeps rows apart.

    Args:
        causal_lm: changed in place, the name of its attention function only.

    Raises:
        UserError: it cannot be done.
    """
    reason = why_not(causal_lm.config)
    if reason:
        raise UserError(f'model.padding_free: found true, but {reason}; expected false')
    register()
    causal_lm.config._attn_implementation = ATTENTION


def fits(config: PretrainedConfig, attention_mask: Tensor) -> bool:
    """Whether no row of ``attention_mask`` [B, S] is longer than the window that the decoder's attention sees."""
    window = getattr(config, 'sliding_window', None)
    return window is None or int(attention_mask.sum(1).max()) <= window


def last_hidden_state(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, S, H] states of a decoder, after the final norm; 0 where ``attention_mask`` [B, S] is 0."""
    real = attention_mask.bool()
    lengths = real.sum(1)
    positions = (attention_mask.cumsum(-1) - 1)[real]
    hidden = backbone(
        input_ids=input_ids[real][None],
        attention_mask=lengths[lengths > 0].cpu().view(1, 1, 1, -1),  # to be read in every layer
        position_ids=positions[None],
        use_cache=False,
    )[0]
    return hidden.new_zeros(*real.shape, hidden.shape[-1]).index_put(real.nonzero(as_tuple=True), hidden[0])
