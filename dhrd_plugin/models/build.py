"""Build models: from a pretrained name, from a checkpoint's metadata, from the folder of an export."""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.pretrained import resolve
from dhrd_plugin.models.probe import check_head, is_token, text_lm
from dhrd_plugin.models.slim import SlimClassifier, SlimClassifierConfig
from dhrd_plugin.models.versions import DTYPE, INFORMED, config_from, misfit_of, no_init_weights, pad_token_of

# E.4 of the paper.
PAPER_LORA: dict[str, Any] = {
    'r': 16,
    'lora_alpha': 32,
    'lora_dropout': 0.1,
    'target_modules': ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj', 'gate_proj'],
}


@contextlib.contextmanager
def _loading(where: str) -> Iterator[None]:
    """What transformers says of a folder, on one line; that it holds code takes it more words than fit."""
    with user_errors(where, kind=True):
        try:
            yield
        except ValueError as error:
            if 'trust_remote_code' not in str(error):
                raise
            raise UserError(
                f'{where}: it brings code of its own, which needs trust_remote_code=true to be run'
            ) from error


def build_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a pad token pads with the model's pad token, or its eos token.

    Args:
        name: see :func:`dhrd_plugin.models.pretrained.resolve`.
        **kwargs: for ``AutoTokenizer.from_pretrained``.

    Returns:
        The tokenizer, which pads on the right.
    """
    kwargs = {'trust_remote_code': False, **kwargs}  # without it transformers asks, on stdin
    with _loading(f'tokenizer: cannot load {name!r}'):
        folder = resolve(name)
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        if tokenizer.pad_token is None:
            with contextlib.suppress(OSError):
                config = AutoConfig.from_pretrained(folder, trust_remote_code=kwargs['trust_remote_code'])
                pad_id = pad_token_of(config)
                if is_token(pad_id, len(tokenizer)):
                    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f'tokenizer: {name!r} has neither a pad token nor an end of text to pad with; expected '
            "tokenizer.kwargs={pad_token: '<pad>'} with a token of its own"
        )
    # Right padding is what an exported classifier expects; the collator pads by itself.
    tokenizer.padding_side = 'right'
    return tokenizer


def build_causal_lm(
    name: str, pretrained: bool = True, config_overrides: Mapping[str, Any] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load the shared backbone with its LM head.

    Args:
        name: see :func:`dhrd_plugin.models.pretrained.resolve`.
        pretrained: ``False`` draws random weights in the same shape. Default: ``True``.
        config_overrides: values of the model's config to change; ``dtype`` is that of the weights, otherwise
            ``float32``. Default: none.
        **kwargs: for ``AutoModelForCausalLM``.

    Returns:
        The causal LM.
    """
    overrides = dict(config_overrides or {})
    dtype = overrides.pop('dtype', overrides.pop('torch_dtype', torch.float32))
    kwargs = {'trust_remote_code': False, DTYPE: dtype, **kwargs}
    key = 'model.pretrained_model_name_or_path'
    with _loading(f'{key}: cannot load {name!r}'):
        folder = resolve(name)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=kwargs['trust_remote_code'])
        text = config.get_text_config()
        for changed, value in overrides.items():
            if not hasattr(text, changed):
                raise UserError(f'model.config_overrides.{changed}: unknown key of {type(text).__name__}')
            setattr(text, changed, value)
        if not pretrained:
            return AutoModelForCausalLM.from_config(text, **kwargs)
        options = {'config': config, **INFORMED, **kwargs}
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    if misfit := misfit_of(info):
        raise UserError(f'{key}: cannot load {name!r}: {misfit}')
    missing = sorted(info['missing_keys'])
    if missing:
        raise UserError(
            f'{key}: {name!r} lacks {len(missing)} of the weights of a {type(model).__name__}, such as {missing[0]}; '
            'expected the checkpoint of a whole causal LM'
        )
    return text_lm(model)


def add_lora(network: DualHeadNetwork, lora: Mapping[str, Any]) -> None:
    """Add LoRA adapters to the backbone and freeze the rest of it; the classification head still trains.

    Args:
        network: changed in place.
        lora: fields of ``peft.LoraConfig``; what is left out is the paper's (E.4).

    Raises:
        UserError: peft refuses them; they add an adapter to the LM head, whose weight alone the loss reads; or they
            train whole modules or tokens beside the adapters, which the export would leave out.
    """
    import peft

    settings = {**PAPER_LORA, **lora}
    for key in ('modules_to_save', 'trainable_token_indices'):
        if settings.get(key):
            raise UserError(f'model.lora.{key}: found {settings[key]}; expected adapters alone, which can be merged')
    with user_errors('model.lora', TypeError, ValueError):
        config = peft.LoraConfig(**settings)
        peft.inject_adapter_in_model(config, network.causal_lm)
    _check_targets(network, settings['target_modules'])
    check_head(network.lm_head, 'model.lora.target_modules')
    network.lora = settings


def _check_targets(network: DualHeadNetwork, names: Any) -> None:
    """Refuse a name of ``target_modules`` that no layer has: peft leaves it out, unless none is there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [name for name, layer in network.causal_lm.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name in () if isinstance(names, str) else names or ():
        if not any(f'.{layer}'.endswith(f'.{name}') for layer in adapted):
            raise UserError(
                f'model.lora.target_modules: found {name!r}, which no linear layer of a {network.config.model_type} is '
                "called; expected their names, or 'all-linear'"
            )


def merged_state(network: DualHeadNetwork) -> dict[str, Tensor]:
    """The backbone's weights with the adapters merged in; the network itself is left as it is.

    Layer by layer, as PEFT's own unloading needs a ``PeftModel``, which adapters that were injected have not,
    and a copy of all weights, as it merges in place.

    Returns:
        Names as in ``network.backbone`` without adapters; values share memory where nothing was merged.
    """
    from peft.tuners.lora import LoraLayer

    state = network.backbone.state_dict()
    for name, module in network.backbone.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = copy.deepcopy(module)
            layer.merge()
            state |= {f'{name}.base_layer.{key}': value for key, value in layer.base_layer.state_dict().items()}
    return {name.replace('.base_layer.', '.'): value for name, value in state.items() if '.lora_' not in name}


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Models that are built inside have no weights yet; what is no weight, such as rotary frequencies, they have.

    The memory of the weights is not touched, nothing is drawn at random. It is for ``load_state_dict(assign=True)``.
    """
    with no_init_weights(), torch.random.fork_rng(devices=[]):
        yield


def rebuild(metadata: Mapping[str, Any]) -> DualHeadNetwork:
    """The network that a checkpoint's metadata describes, without weights (:func:`without_weights`).

    Args:
        metadata: of :meth:`~dhrd_plugin.ComposerDualHeadClassifier.get_metadata`.

    Returns:
        The network, adapters included.
    """
    settings = metadata['dhrd']
    config = config_from(metadata['model']['config']['content'])
    with without_weights():
        causal_lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        heads = {key: settings[key] for key in ('head', 'pooling', 'dropout')}
        heads['norm'] = settings.get('norm', False)  # a checkpoint of an older version has none
        network = DualHeadNetwork(causal_lm, len(settings['label_names']), **heads, probe=False)
        if settings.get('lora'):
            add_lora(network, settings['lora'])
    return network


def is_sequence_classifier(inner: nn.Module) -> bool:
    """Whether this is the ``...ForSequenceClassification`` that Hugging Face has for its config, or a subclass."""
    config = getattr(inner, 'config', None)
    stock = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)  # pyright: ignore
    return stock is not None and isinstance(inner, stock)  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    """Transformers 5 shows one for each model that it loads, however small."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_slim(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load the model of a slim export, or another Hugging Face classifier; code in the folder is never run.

    Args:
        folder: with a ``config.json``.
        **kwargs: for ``from_pretrained``.

    Returns:
        The classifier, in evaluation mode.

    Raises:
        UserError: the folder lacks weights of the classifier, which transformers draws at random instead.
    """
    config = load_slim_config(folder)
    options = {'config': config, 'trust_remote_code': False, **INFORMED, **kwargs}
    kind: Any = SlimClassifier if isinstance(config, SlimClassifierConfig) else AutoModelForSequenceClassification
    with without_progress_bar():
        model, info = kind.from_pretrained(folder, **options)
    if misfit := misfit_of(info):
        raise UserError(f'{folder}: cannot be loaded: {misfit}')
    if info['missing_keys']:
        raise UserError(
            f'{folder}: found no weight named {min(info["missing_keys"])}; expected those of {type(model).__name__}'
        )
    return model.eval()


def load_slim_config(folder: str | Path) -> PretrainedConfig:
    """Load the config of such a model; code in the folder is never run."""
    kind = json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8')).get('model_type')
    if kind == SlimClassifierConfig.model_type:
        return SlimClassifierConfig.from_pretrained(folder)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)
