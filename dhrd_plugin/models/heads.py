"""The way from token ids to class logits. This file travels with an exported classifier: only torch here."""

import inspect
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

HEADS = ('mlp', 'linear')
Pooling = Literal['last', 'mean']
POOLINGS = get_args(Pooling)


def decoder_inputs(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Keyword arguments for a decoder without its LM head.

    Positions count real tokens, so that left and right padding give the same states also where
    positions are absolute (GPT-2).

    Args:
        backbone: a Hugging Face decoder, e.g. ``LlamaModel``.
        input_ids: [B, S].
        attention_mask: [B, S], 1 for real tokens.
    """
    accepted = inspect.signature(backbone.forward).parameters
    kwargs: dict[str, Any] = {'input_ids': input_ids, 'attention_mask': attention_mask}
    if 'use_cache' in accepted:
        kwargs['use_cache'] = False
    if 'position_ids' in accepted:
        kwargs['position_ids'] = positions(attention_mask)
    return kwargs


def positions(attention_mask: Tensor) -> Tensor:
    """[B, S] positions of the real tokens of ``attention_mask`` [B, S]; padding has that of its neighbour."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def last_hidden_state(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, S, H] states of a decoder, after the final norm; arguments as in :func:`decoder_inputs`."""
    return backbone(**decoder_inputs(backbone, input_ids, attention_mask))[0]


def last_real_index(attention_mask: Tensor) -> Tensor:
    """[B] position of the last real token of each row of ``attention_mask`` [B, S]."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * columns).argmax(-1)


def upto(attention_mask: Tensor, pool_index: Tensor) -> Tensor:
    """Make a mask [B, S], bool, ``True`` up to and including ``pool_index`` [B]."""
    return torch.arange(attention_mask.shape[1], device=attention_mask.device) <= pool_index[:, None]


def pool(hidden: Tensor, attention_mask: Tensor, pool_index: Tensor, pooling: str) -> Tensor:
    """Reduce the hidden states of the input span to one vector.

    Args:
        hidden: [B, S, H].
        attention_mask: [B, S], 1 for real tokens.
        pool_index: [B], position of the last input token.
        pooling: ``'last'`` (the paper, section 3.1) or ``'mean'`` over the real tokens up to ``pool_index``.

    Returns:
        [B, H].
    """
    if pooling == 'last':
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), pool_index]
    # Selected, not multiplied: a rationale's state must not reach the sum even as 0 * inf.
    span = (attention_mask.bool() & upto(attention_mask, pool_index))[..., None]
    return torch.where(span, hidden, 0).sum(1) / span.sum(1)


class ClassificationHead(nn.Module):
    """[B, H] pooled states to [B, K] logits.

    The head runs in fp32, under autocast and also where FSDP hands it weights in half precision: it is small, and
    its logits are compared with each other.

    Args:
        hidden_size: H.
        num_labels: K.
        kind: ``'mlp'``, two layers with GELU between (the paper), or ``'linear'``, one layer without
            bias, the head of Hugging Face's ``...ForSequenceClassification``.
        dropout: applied before each layer.
        initializer_range: standard deviation of the initial weights.
        norm: a LayerNorm before the first of the two layers: the states of some backbones are two hundred
            times longer than others'. ``mlp`` alone has it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        kind: str = 'mlp',
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        norm: bool = False,
    ):
        super().__init__()
        if kind not in HEADS:
            raise ValueError(f"head: found {kind!r}; expected 'mlp' or 'linear'")
        if norm and kind != 'mlp':
            raise ValueError(f"norm: found with head {kind!r}; expected 'mlp', the head that can have one")
        self.kind = kind
        self.norm = nn.LayerNorm(hidden_size) if norm else None
        self.dropout = nn.Dropout(dropout)
        if kind == 'mlp':
            self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, num_labels, bias=kind == 'mlp')
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=initializer_range)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, H] to [B, K]."""
        with torch.autocast(pooled.device.type, enabled=False):
            dtype = torch.promote_types(self.out_proj.weight.dtype, torch.float32)
            pooled = pooled.to(dtype)
            if self.norm is not None:
                norm = self.norm
                weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
                pooled = nn.functional.layer_norm(pooled, norm.normalized_shape, weight, bias, norm.eps)
            if self.kind == 'mlp':
                pooled = nn.functional.gelu(_linear(self.dense, self.dropout(pooled)))
            return _linear(self.out_proj, self.dropout(pooled))


def _linear(layer: nn.Linear, states: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(states.dtype)
    return nn.functional.linear(states, layer.weight.to(states.dtype), bias)
