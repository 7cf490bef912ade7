"""A few tokens through a backbone, before anything is trained: whether the method can be applied to it.

What a model does is looked at, not its name: which module is the decoder, whether later tokens move earlier
states, whether padding does, and whether its logits are plainly ``lm_head(hidden)``, as the chunked loss has them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig, PreTrainedModel

from dhrd_plugin.errors import UserError, one_line, user_errors
from dhrd_plugin.models.heads import decoder_inputs, last_hidden_state
from dhrd_plugin.models.versions import config_from, pad_token_of, turning_rope

EXPECTED = 'expected a decoder-only causal LM with an LM head (AutoModelForCausalLM)'
HALF = 4  # tokens that both rows of the probe begin with; as many follow
_LOUD = 50.0  # logits to probe with: those of a model at its start are too small to meet a soft cap


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder without its head; of some models (Gemma-3) ``base_model`` is the model itself."""
    if model.base_model is not model:
        return model.base_model  # pyright: ignore
    inner = [module for module in model.children() if isinstance(module, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else model


def text_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM of the text part of a model of several parts (Gemma-3 with its images); any other as it is.

    Args:
        model: with an LM head; its weights are shared, not copied.

    Raises:
        UserError: transformers has no causal LM of that text part.
    """
    config = model.config.get_text_config()
    if config is model.config or model.config.is_encoder_decoder:
        return model
    decoder: Any = getattr(model, 'get_decoder', lambda: None)()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is not None:
        lm = lm_around(decoder, config, model.get_output_embeddings())
        if lm is not None:
            return lm
    raise UserError(
        f'{type(model).__name__}: a {model.config.model_type} has parts besides its text, and transformers has no '
        f'causal LM of a {config.model_type} alone; {EXPECTED}'
    )


def lm_around(decoder: Any, config: PretrainedConfig, head: nn.Module | None) -> PreTrainedModel | None:
    """The causal LM of a config around a decoder and an LM head that are there already.

    Args:
        decoder: becomes its decoder.
        config: of the decoder.
        head: becomes its LM head.

    Returns:
        The causal LM; ``None`` where its decoder is of another class, or it has more weights than these.
    """
    with torch.device('meta'):
        lm = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config)  # pyright: ignore
    place = next((name for name, module in lm.named_children() if module is decoder_of(lm)), None)
    if place is None or type(decoder_of(lm)) is not type(decoder):
        return None
    setattr(lm, place, decoder)
    lm.set_output_embeddings(head)
    lm.config = decoder.config  # the one that its layers read
    return None if any(weight.is_meta for weight in lm.parameters()) else lm


def check_decoder(causal_lm: PreTrainedModel, run: bool = True) -> bool:
    """Refuse a causal LM that the method cannot be applied to.

    Args:
        causal_lm: left as it is, as are the random generators; one on the meta device is not run.
        run: whether its weights are there to be run. Default: ``True``.

    Returns:
        Whether padding on the left leaves its states as they are; padding on the right does.

    Raises:
        UserError: what differs, in one line.
    """
    name, config = type(causal_lm).__name__, causal_lm.config
    head = causal_lm.get_output_embeddings() if isinstance(causal_lm, PreTrainedModel) else None
    if head is None or config.is_encoder_decoder:
        raise UserError(f'{name}: {EXPECTED}')
    check_head(head, name)
    decoder = decoder_of(causal_lm)
    _check_class(decoder, config, name)
    if not run:
        return True
    with running(causal_lm, name) as runs:
        if runs:
            states, left = _check_states(decoder, causal_lm, name)
            _check_logits(causal_lm, head, states, name)
            return left
    return True


def check_head(head: nn.Module, where: str) -> None:
    """Refuse an LM head with adapters: the chunked loss reads weight and bias alone, so they would not train."""
    more = sorted({name for name, _ in head.named_parameters()} - {'weight', 'bias'})
    if more:
        raise UserError(
            f'{where}: found an adapter on the LM head ({more[-1]}), which the reasoning loss does not read; '
            'expected layers of the decoder alone'
        )


def check_classifier(model: PreTrainedModel) -> None:
    """Refuse a ``...ForSequenceClassification`` that cannot have its input embedding as reasoning head.

    Args:
        model: left as it is, as are the random generators; one on the meta device is not run.

    Raises:
        UserError: what differs, in one line.
    """
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise _leak(name)
    decoder = decoder_of(model)
    with running(model, name) as runs:
        if not runs:
            return
        states, _ = _check_states(decoder, model, name)
        if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is None:
            return
        embedding: Any = model.get_input_embeddings()
        head = nn.Linear(1, 1, bias=False, device='meta')
        head.weight = embedding.weight
        lm = lm_around(decoder, config, head)
        if lm is None:
            raise UserError(f'{name}: its causal LM is not a decoder and an LM head alone; {EXPECTED}')
        _check_logits(lm.eval(), head, states, name)


def pads_left(classifier: PreTrainedModel) -> bool:
    """Whether a classifier says the same of a row that is padded on the left; some pool another token of it."""
    # A user's own forward pass may want more than this; then nobody knows.
    with suppress(UserError), running(classifier, type(classifier).__name__) as runs:
        if runs:
            ids, mask = (value[2:] for value in probe_rows(classifier))
            right, left = classifier(input_ids=ids, attention_mask=mask)[0]
            return bool((left - right).abs().max() <= tolerance(right) * right.abs().max())
    return True


def left_padding(model: nn.Module) -> UserError:
    """What to say of a batch that is padded on the left where that changes the result."""
    return UserError(
        f'padding_side: found padding on the left, which changes what {type(model).__name__} makes of a row; expected '
        "'right'"
    )


def check_rope(config: PretrainedConfig, longest: int, where: str = 'reasoning loss') -> None:
    """Refuse rows so long that their rationale would change what the model makes of their input, and of other rows.

    Args:
        config: of the decoder.
        longest: tokens of the longest row, its rationale included.
        where: what the error begins with.
    """
    limit, _ = turning_rope(config) or (longest, '')
    if longest > limit:
        raise UserError(
            f'{where}: found {longest} tokens; beyond {limit} the RoPE of this {config.model_type} turns all positions '
            f'otherwise, so that a rationale would change its input; expected max_seq_len: {limit}, or less'
        )


@contextmanager
def running(model: PreTrainedModel, name: str) -> Iterator[bool]:
    """Whether it can be run; without gradient, dropout and a draw from the random generators; then as it was."""
    if any(weight.is_meta for weight in model.parameters()):
        yield False
        return
    device, attention = model.device, model.config._attn_implementation
    if device.type == 'cpu' and str(attention).startswith('flash'):  # has kernels for GPUs alone
        model.config._attn_implementation = 'sdpa'
    try:
        devices = [device] if device.type == 'cuda' else []
        generators, precision = torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False)
        with evaluating(model), torch.no_grad(), generators, precision:
            yield True
    except UserError:
        raise
    except Exception as error:
        if device.type == 'cpu' and torch.cuda.is_available():  # it may need one
            return
        raise UserError(f'{name}: cannot run {2 * HALF} tokens: {one_line(error, kind=True)}') from error
    finally:
        model.config._attn_implementation = attention


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; then each module of it as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_class(decoder: nn.Module, config: PretrainedConfig, name: str) -> None:
    """Refuse a decoder that no export could be loaded into, such as that of an encoder-decoder."""
    if not type(config).__module__.startswith('transformers.'):
        return
    made: Any = MODEL_MAPPING.get(type(config), None)
    if not (made and isinstance(decoder, made)):
        other = f'a {getattr(made, "__name__", made)}' if made else 'nothing'
        raise UserError(
            f'{name}: its decoder is a {type(decoder).__name__}, and AutoModel makes {other} of its config, so no '
            f'export of it could be loaded; {EXPECTED}'
        )
    with user_errors(f'{name}: transformers cannot read its config again, so no export of it could be loaded'):
        config_from(config.to_dict())


def probe_rows(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """[4, 2 * HALF] tokens and their mask: a row, one with another end, the beginning padded right, and left."""
    embedding: Any = model.get_input_embeddings()
    count, pad = len(embedding.weight), pad_token_of(model.config)
    ids = torch.arange(1, 3 * HALF + 1) * count // (3 * HALF + 1)
    ids = torch.where(ids == (-1 if pad is None else pad), (ids + 1) % count, ids)  # to some its place is padding
    first, second, other = ids.split(HALF)
    none = torch.full_like(first, pad if is_token(pad, count) else 0)  # pyright: ignore
    rows = torch.stack([torch.cat(row) for row in ((first, second), (first, other), (first, none), (none, first))])
    mask = torch.ones_like(rows)
    mask[2, HALF:] = mask[3, :HALF] = 0
    return rows.to(embedding.weight.device), mask.to(embedding.weight.device)


def is_token(found: Any, count: int) -> bool:
    """Whether something, such as a config's ``pad_token_id``, is one of ``count`` tokens; -1 or ``None`` is not."""
    return isinstance(found, int) and 0 <= found < count


def _check_states(decoder: PreTrainedModel, model: PreTrainedModel, name: str) -> tuple[Tensor, bool]:
    """Refuse states that move with later tokens or with padding on the right.

    Returns:
        [4, 2 * HALF, H] states of :func:`probe_rows`, and whether padding on the left leaves them as they are.
    """
    states = last_hidden_state(decoder, *probe_rows(model))
    row, changed, right, left = states.float()
    if not row.isfinite().all():
        raise UserError(f'{name}: its states of {2 * HALF} tokens are not finite; expected weights that are numbers')

    def moved(found: Tensor) -> bool:
        return not distance(found, row[:HALF], row) <= tolerance(states)  # also where it is no number

    if moved(changed[:HALF]):
        raise _leak(name)
    inputs = decoder_inputs(decoder, *probe_rows(model))
    if inputs.pop('use_cache', None) is False and moved(decoder(**inputs)[0][0].float()[:HALF]):
        raise UserError(f'{name}: its states of a row are others without a cache than with one; {EXPECTED}')
    if moved(right[:HALF]):
        raise UserError(f'{name}: padding behind the tokens moves their states; {EXPECTED}')
    return states, not moved(left[HALF:])


def distance(found: Tensor, wanted: Tensor, states: Tensor) -> float:
    """Between states [T, H], in units of what tells the tokens of ``states`` [T, H] apart."""
    spread = (states - states.mean(0)).square().mean().sqrt().clamp(min=1e-12)
    return float((found - wanted).square().mean().sqrt() / spread)


def tolerance(states: Tensor) -> float:
    """For rounding; in half precision a mixture of experts may choose others by it."""
    exact = states.dtype in (torch.float32, torch.float64) and states.device.type == 'cpu'
    return 3e-4 if exact else 0.2


def _leak(name: str) -> UserError:
    return UserError(
        f'{name}: an encoder reads the rationale when it pools the input (later tokens move its earlier states), so '
        'the label would leak; expected a decoder-only causal LM'
    )


def _check_logits(causal_lm: PreTrainedModel, head: Any, states: Tensor, name: str) -> None:
    """Refuse a model whose own loss is not the chunked one: what its LM head reads, gives, and what is added."""
    if head.weight.shape[1] != states.shape[-1]:
        raise UserError(
            f'{name}: its LM head reads states of width {head.weight.shape[1]}, and its decoder gives states of '
            f'width {states.shape[-1]}; {EXPECTED}'
        )
    logits = nn.functional.linear(states[0], head.weight, head.bias)  # the others may hold anything for padding
    loud = states * (_LOUD / logits.abs().amax().clamp(min=1e-6))
    read: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        read.append(args[0])
        return (loud,)

    handle = head.register_forward_pre_hook(replace)
    try:
        out = causal_lm(**decoder_inputs(causal_lm, *probe_rows(causal_lm)))
    finally:
        handle.remove()
    refused = f'which the chunked reasoning loss does not apply; {EXPECTED} whose logits are lm_head(hidden)'
    other = not read or read[0].shape != states.shape
    if other or not distance(read[0].float()[0], states.float()[0], states.float()[0]) <= tolerance(states):
        raise UserError(f'{name}: there are more layers between its decoder and its LM head, {refused}')
    wanted = nn.functional.linear(loud[0], head.weight, head.bias).float()
    found = (out[0] if isinstance(out, tuple) else out.logits)[0].float()  # a tuple where return_dict is False
    if wanted.shape != found.shape or not (found - wanted).abs().amax() <= 0.02 * wanted.abs().amax():
        raise UserError(f'{name}: its logits are not lm_head(hidden){_hint(causal_lm.config)}, {refused}')
    if getattr(out, 'aux_loss', None) is not None:
        raise UserError(
            f'{name}: adds the auxiliary loss of its router, which is not trained on here; expected '
            'config_overrides={output_router_logits: false}'
        )


def _hint(config: PretrainedConfig) -> str:
    """The keys of a config that have to do with logits, by their names."""
    keys = [key for key in config.to_dict() if 'logit' in key or 'lm_head' in key]
    found = [f'{key} {getattr(config, key)}' for key in keys if getattr(config, key, None) not in (None, 0, 1)]
    return f': its config sets {", ".join(found)}' if found else ''
