"""Give the model of an existing pipeline a reasoning head, in place."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from composer.models import HuggingFaceModel
from composer.models.huggingface import maybe_get_underlying_model
from composer.utils import ensure_tuple
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from dhrd_plugin.errors import UserError
from dhrd_plugin.losses import chunked_lm_loss
from dhrd_plugin.models.build import build_causal_lm, is_sequence_classifier
from dhrd_plugin.models.composer_model import RETURN_REASONING_LOSS, ComposerDualHeadClassifier
from dhrd_plugin.models.extent import Extent
from dhrd_plugin.models.heads import decoder_inputs, upto
from dhrd_plugin.models.network import DualHeadNetwork, check_pool_index
from dhrd_plugin.models.probe import check_classifier, check_decoder, check_rope, decoder_of, left_padding, pads_left
from dhrd_plugin.models.verbalizer import begin_as_answers
from dhrd_plugin.models.versions import pad_token_of

EXPECTED = 'expected a HuggingFaceModel around a decoder-only ...ForSequenceClassification or ...ForCausalLM'


def apply_reasoning_head(
    model: nn.Module,
    pretrained_model_name_or_path: str | None = None,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
    label_names: Sequence[str] | None = None,
    chunk_size: int | None = None,
    answers: Sequence[str] | None = None,
    **heads: Any,
) -> HuggingFaceModel:
    """Give the model of an existing pipeline the reasoning head, in place.

    A ``HuggingFaceModel`` around a decoder-only ``...ForSequenceClassification`` stays what it is,
    under the names that its parameters had: its own forward pass pools, scores and takes the
    classification loss. Where a batch carries a rationale
    (:class:`~dhrd_plugin.RationaleCollator`) the same pass runs over it too and returns its loss.
    Around a ``...ForCausalLM`` it becomes a :class:`ComposerDualHeadClassifier` with that LM's own
    head for reasoning. Tokenizer, metrics, weights and the optimizer's state and groups are kept.
    A model that has a reasoning head already is left alone.

    Args:
        model: changed in place.
        pretrained_model_name_or_path: the checkpoint whose LM head is the reasoning head of a
            classifier. Default: none, the classifier's input embedding, which it is where the two are tied.
        optimizers: new parameters join the group of the input embedding, else the last group. Default: none.
        label_names: the K class names; for a ``...ForCausalLM``, which has none.
        chunk_size: supervised tokens whose vocabulary logits are alive at a time. Default: 256, on a GPU more
            (:func:`~dhrd_plugin.losses.default_chunk_size`).
        answers: the words of the K classes; the classification head begins as the LM head's rows of them
            (:func:`~dhrd_plugin.models.verbalizer.begin_as_answers`): a classifier's ``score``, or
            ``head='linear'`` of a ``...ForCausalLM``. Default: it is left as it is.
        **heads: ``head``, ``pooling``, ``dropout``, ``norm`` of :class:`DualHeadNetwork`; for a ``...ForCausalLM``.

    Returns:
        ``model``.

    Raises:
        UserError: an encoder, or any other model that is not decoder-only; a classifier whose LM head is not
            tied, without its checkpoint; one that pads with another token than its tokenizer; an argument that
            does not apply to this kind of model.

    Example:
        >>> model = HuggingFaceModel(AutoModelForSequenceClassification.from_pretrained(name), tokenizer)
        >>> apply_reasoning_head(model, name)
    """
    if has_reasoning_head(model):
        return model  # pyright: ignore[reportReturnType]
    if not isinstance(model, HuggingFaceModel):
        raise UserError(f'auxiliary_reasoning_loss: found a model of type {type(model).__name__}; {EXPECTED}')
    inner: Any = maybe_get_underlying_model(model.model)
    if inner.get_output_embeddings() is not None:
        if pretrained_model_name_or_path is not None:
            raise UserError(
                f'pretrained_model_name_or_path: found with {type(inner).__name__}, whose own LM head is the reasoning '
                'head; leave it out'
            )
        _make_dual_head(model, label_names, optimizers, answers, chunk_size=chunk_size, **heads)
    elif is_sequence_classifier(inner):
        for name in ['label_names'] * (label_names is not None) + list(heads):
            raise UserError(f'{name}: found with {type(inner).__name__}, which brings its own; leave it out')
        _add_reasoning_head(model, inner, pretrained_model_name_or_path, optimizers, chunk_size, answers)
    else:
        raise UserError(f'auxiliary_reasoning_loss: found a {type(inner).__name__}; {EXPECTED}')
    return model


def has_reasoning_head(model: nn.Module) -> bool:
    """Whether a model is ours, or :func:`apply_reasoning_head` was applied to it."""
    if isinstance(model, ComposerDualHeadClassifier):
        return True
    return isinstance(model, HuggingFaceModel) and isinstance(
        maybe_get_underlying_model(model.model), ReasoningClassifier
    )


# ------------------------------------------------------------- a stock ...ForSequenceClassification


@dataclass
class ReasoningClassifierOutput(SequenceClassifierOutput):
    """A classifier's output, and ``reasoning_loss`` [B], the mean next-token loss of each sequence."""

    reasoning_loss: Tensor | None = None


class ReasoningClassifier(PreTrainedModel):
    """Mixin of :func:`apply_reasoning_head` for a stock ``...ForSequenceClassification``.

    Attributes:
        lm_head: the reasoning head where it is not the input embedding.
        reasoning_chunk_size: supervised tokens whose vocabulary logits are alive at a time.
        pads_left: whether its logits of a row that is padded on the left are those of one padded on the right.
    """

    reasoning_chunk_size: int | None
    pads_left: bool = True

    def forward(self, *args, pool_index=None, reasoning_labels=None, return_reasoning_loss=False, spans=None, **kwargs):
        """Run the stock forward pass; unchanged where the batch carries no rationale.

        But for positions: they count real tokens, where stock code such as GPT-2's counts padding on the left as well.

        The stock code pools the last token that is not padding. So it is shown the input alone, with padding
        in the place of the rationale; the backbone reads the rationale too where its loss is asked for.

        Args:
            *args: of the stock forward pass.
            pool_index: [B] position of the last *input* token; absent where no row has a rationale.
            reasoning_labels: [B, S] token ids aligned with ``input_ids``, -100 where unsupervised.
            return_reasoning_loss: run the rationale and return its loss.
            spans: where each of the B rows lies; see :class:`~dhrd_plugin.TripletCollator`.
            **kwargs: of the stock forward pass, such as ``labels`` [B].

        Returns:
            The stock output, and ``reasoning_loss`` [B] where it was asked for.
        """
        if pool_index is None:
            check_pool_index(reasoning_labels)
            with reading(decoder_of(self), self._positions(kwargs)):
                out = super().forward(*args, **kwargs)  # pyright: ignore
            return self._output(out, return_reasoning_loss, kwargs)
        reason = return_reasoning_loss and reasoning_labels is not None
        mask = kwargs['attention_mask']
        span = mask * upto(mask, pool_index)
        extent = Extent.of(spans, reason) if spans else Extent.read(mask if reason else span, reasoning_labels)
        if reason:
            check_rope(self.config.get_text_config(), extent.longest)
        shown, read = self._inputs({**kwargs, 'reasoning_labels': reasoning_labels}, span, extent, reason)
        labels = shown.pop('reasoning_labels')
        with reading(decoder_of(self), read) as states:
            out = super().forward(**shown)  # pyright: ignore
        if not reason:
            return self._output(out, return_reasoning_loss, kwargs)
        weight, bias = self.reasoning_head
        loss = chunked_lm_loss(states[0], labels, weight, bias, self.reasoning_chunk_size, extent.targets)
        return ReasoningClassifierOutput(*_loss_and_logits(out, kwargs), reasoning_loss=loss)  # pyright: ignore

    @property
    def reasoning_head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias of the reasoning head."""
        head = getattr(self, 'lm_head', None) or self.get_input_embeddings()
        return head.weight, getattr(head, 'bias', None)  # pyright: ignore

    def _inputs(self, kwargs: Mapping[str, Any], span: Tensor, extent: Extent, reason: bool) -> tuple[dict, dict]:
        """Inputs of the stock code, without columns that are all padding, and inputs of the backbone."""
        ids, first, last = kwargs['input_ids'], extent.first, extent.last
        if not self.pads_left and not extent.from_left:
            raise left_padding(self)
        shown = {
            key: value[:, first:last] if _is_per_token(key, value, ids) else value for key, value in kwargs.items()
        }
        span = span[:, first:last]
        read = decoder_inputs(decoder_of(self), shown['input_ids'], shown['attention_mask'] if reason else span)
        shown['attention_mask'] = span
        shown['input_ids'] = shown['input_ids'].where(span.bool(), self.config.pad_token_id)
        return shown, read

    def _positions(self, kwargs: Mapping[str, Any]) -> dict:
        """The positions that rows with a rationale have: without them padding on the left would count as well."""
        ids, mask = kwargs.get('input_ids'), kwargs.get('attention_mask')
        if ids is None or mask is None or kwargs.get('position_ids') is not None:
            return {}
        inputs = decoder_inputs(decoder_of(self), ids, mask)
        return {key: value for key, value in inputs.items() if key == 'position_ids'}

    def _output(self, out: Any, return_reasoning_loss: bool, kwargs: Mapping[str, Any]) -> Any:
        """The output where the rationale was not run: the stock one, if that is enough."""
        loss, logits = _loss_and_logits(out, kwargs)
        head = getattr(self, 'lm_head', None)
        # DDP and FSDP expect a gradient for every parameter, also where no rationale is read.
        zero = logits.new_zeros(())
        for parameter in head.parameters() if head is not None else ():
            zero = zero + parameter.flatten()[0] * 0
        if not return_reasoning_loss and not zero.requires_grad:
            return out
        return ReasoningClassifierOutput(
            None if loss is None else loss + zero,  # pyright: ignore
            logits + zero,  # pyright: ignore
            reasoning_loss=zero.expand(len(logits)) if return_reasoning_loss else None,
        )


def _is_per_token(key: str, value: object, input_ids: Tensor) -> bool:
    """Whether a part of the batch has a value for each token; labels [B, K] have not, whatever K is."""
    return isinstance(value, Tensor) and value.shape == input_ids.shape and key != 'labels'


@functools.cache
def _reasoning_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """``stock`` with :class:`ReasoningClassifier` mixed in, under its own name: that is what checkpoints store."""
    ignored = ['lm_head.weight', 'lm_head.bias']
    return type(
        stock.__name__,
        (ReasoningClassifier, stock),
        {
            '__module__': stock.__module__,
            '__qualname__': stock.__qualname__,
            '__doc__': stock.__doc__,
            '_keys_to_ignore_on_save': [*(stock._keys_to_ignore_on_save or ()), *ignored],
        },
    )


@contextmanager
def reading(backbone: nn.Module, inputs: Mapping[str, Any]) -> Iterator[list[Tensor]]:
    """Make ``backbone`` read ``inputs``, whatever it is called with; yields the list of its last hidden states."""
    states: list[Tensor] = []

    def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return () if 'input_ids' in inputs else args, {**kwargs, **inputs}

    handles = [
        backbone.register_forward_pre_hook(replace, with_kwargs=True),
        backbone.register_forward_hook(lambda module, args, out: states.append(out[0])),
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _loss_and_logits(out: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
    # A tuple where config.return_dict is False; either kind is indexed alike.
    return (out[0], out[1]) if kwargs.get('labels') is not None else (None, out[0])


def _add_reasoning_head(
    model: HuggingFaceModel,
    inner: PreTrainedModel,
    name: str | None,
    optimizers: Optimizer | Sequence[Optimizer] | None,
    chunk_size: int | None,
    answers: Sequence[str] | None,
) -> None:
    kind, pad = type(inner).__name__, pad_token_of(inner.config)
    if pad is None or pad < 0:
        raise UserError(
            f'{kind}: found pad_token_id {pad} in its config, so it cannot tell where an input ends; '
            'set model.config.pad_token_id = tokenizer.pad_token_id'
        )
    padding = getattr(model.tokenizer, 'pad_token_id', None)
    if padding not in (None, pad):
        raise UserError(
            f'{kind}: found pad_token_id {pad} in its config and {padding} in its tokenizer, so it would take padding '
            'for the end of an input; set model.config.pad_token_id = tokenizer.pad_token_id'
        )
    if name is None and not inner.config.tie_word_embeddings:
        raise UserError(
            f'pretrained_model_name_or_path: missing; the LM head of this {kind} is not tied to its input embedding '
            '(tie_word_embeddings), so name the checkpoint whose LM head is the reasoning head'
        )
    check_classifier(inner)
    embedding: Any = inner.get_input_embeddings()
    head = None if name is None else _load_lm_head(name, inner)
    if answers is not None:
        if not hasattr(inner, 'score'):
            raise UserError(f'answers: found with {kind}; expected a classifier whose linear layer is its `score`')
        begin_as_answers(inner.score, head or embedding, model.tokenizer, answers)
    inner.__class__ = _reasoning_class(type(inner))
    inner._keys_to_ignore_on_save = type(inner)._keys_to_ignore_on_save  # transformers 5 reads a copy of its own
    inner.reasoning_chunk_size = chunk_size  # pyright: ignore
    inner.pads_left = pads_left(inner)  # pyright: ignore
    model.model_forward_args |= {'pool_index', 'reasoning_labels', RETURN_REASONING_LOSS, 'spans'}
    if head is None:
        return
    decoder, inner.lm_head = decoder_of(inner), head
    # The classification head stays last: LayerFreezing spares the last layer.
    for key in [key for key, module in inner._modules.items() if module is not decoder and key != 'lm_head']:
        inner._modules[key] = inner._modules.pop(key)
    inner.register_load_state_dict_pre_hook(_keep_lm_head)
    _add_to_optimizers(optimizers, head, beside=embedding.weight)


def _keep_lm_head(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep the pretrained LM head where a checkpoint, from before it was added, holds none."""
    for name, parameter in module.lm_head.named_parameters():  # pyright: ignore
        state.setdefault(f'{prefix}lm_head.{name}', parameter.detach())


def _load_lm_head(name: str, inner: PreTrainedModel) -> nn.Linear | None:
    """The LM head of a pretrained checkpoint, for a classifier; ``None`` where it is tied to the input embedding.

    It trains if the classifier's input embedding does.
    """
    causal_lm = build_causal_lm(name)
    check_decoder(causal_lm)
    embedding: Any = inner.get_input_embeddings()
    config, wanted = causal_lm.config, inner.config
    if (config.model_type, config.hidden_size) != (wanted.model_type, wanted.hidden_size):
        raise UserError(
            f'pretrained_model_name_or_path: found a {config.model_type} of hidden size {config.hidden_size}; '
            f'expected the checkpoint of the classifier, a {wanted.model_type} of {wanted.hidden_size}'
        )
    if causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight:  # pyright: ignore
        return None
    if config.vocab_size < len(embedding.weight):  # markers that are added tokens
        causal_lm.resize_token_embeddings(len(embedding.weight))
    head: Any = causal_lm.get_output_embeddings()
    return head.to(embedding.weight).requires_grad_(embedding.weight.requires_grad)


# --------------------------------------------------------------------------------- a ...ForCausalLM


def _make_dual_head(
    model: HuggingFaceModel,
    label_names: Sequence[str] | None,
    optimizers: Optimizer | Sequence[Optimizer] | None,
    answers: Sequence[str] | None,
    **heads: Any,
) -> None:
    causal_lm = model.model
    kind = type(causal_lm).__name__
    if not label_names:
        raise UserError(f'label_names: missing; {kind} has no classes, so name them in the order of the labels')
    if type(model) is not HuggingFaceModel or not isinstance(causal_lm, PreTrainedModel):
        raise UserError(
            f'auxiliary_reasoning_loss: found {type(model).__name__} around {kind}; expected a plain HuggingFaceModel '
            'around the causal LM itself, or a ComposerDualHeadClassifier'
        )
    network = DualHeadNetwork(causal_lm, len(label_names), **heads)
    if answers is not None:
        network.begin_as_answers(model.tokenizer, answers)  # pyright: ignore
    embedding: Any = causal_lm.get_input_embeddings()
    network.classifier.to(embedding.weight.device)
    kept = {name: getattr(model, name) for name in ('logger', 'train_metrics', 'val_metrics')}
    model.__class__ = ComposerDualHeadClassifier
    model.__init__(network, model.tokenizer, label_names)  # pyright: ignore
    for name, value in kept.items():
        if value is not None:
            setattr(model, name, value)
    _add_to_optimizers(optimizers, network.classifier, beside=embedding.weight)


def _add_to_optimizers(
    optimizers: Optimizer | Sequence[Optimizer] | None, module: nn.Module, beside: nn.Parameter
) -> None:
    """Train a new module in the parameter group of ``beside``, else in the last; nothing else changes."""
    groups = [group for optimizer in ensure_tuple(optimizers) for group in optimizer.param_groups]
    if groups:
        group = next((group for group in groups if any(p is beside for p in group['params'])), groups[-1])
        group['params'].extend(p for p in module.parameters() if p.requires_grad)
