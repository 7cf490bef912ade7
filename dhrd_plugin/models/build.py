"""Build a dual-head network from a pretrained name, or again from a checkpoint's metadata."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dhrd_plugin.errors import UserError
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.pretrained import resolve

# E.4 of the paper.
PAPER_LORA: dict[str, Any] = {
    'r': 16,
    'lora_alpha': 32,
    'lora_dropout': 0.1,
    'target_modules': ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj', 'gate_proj'],
}


@contextlib.contextmanager
def _user_errors(key: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'{key}: cannot load {name!r}: {reason}') from error


def build_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a pad token pads with the model's pad token, or its eos token.

    Args:
        name: see :func:`dhrd_plugin.models.pretrained.resolve`.
        **kwargs: for ``AutoTokenizer.from_pretrained``.

    Raises:
        UserError: it cannot be loaded.
    """
    with _user_errors('tokenizer', name):
        folder = resolve(name)
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        if tokenizer.pad_token is None:
            with contextlib.suppress(OSError):
                pad_id = AutoConfig.from_pretrained(folder).pad_token_id
                tokenizer.pad_token = None if pad_id is None else tokenizer.convert_ids_to_tokens(pad_id)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # Right padding is what an exported classifier expects; the collator pads by itself.
    tokenizer.padding_side = 'right'
    return tokenizer


def build_causal_lm(
    name: str,
    pretrained: bool = True,
    config_overrides: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the shared backbone with its LM head.

    Args:
        name: see :func:`dhrd_plugin.models.pretrained.resolve`.
        pretrained: ``False`` draws random weights in the same shape.
        config_overrides: values of the model's config to change.
        **kwargs: for ``AutoModelForCausalLM``.

    Raises:
        UserError: it cannot be loaded, or an override names no value of its config.
    """
    with _user_errors('model.pretrained_model_name_or_path', name):
        folder = resolve(name)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=kwargs.get('trust_remote_code', False))
        for key, value in (config_overrides or {}).items():
            if not hasattr(config, key):
                raise UserError(f'model.config_overrides.{key}: unknown key of {type(config).__name__}')
            setattr(config, key, value)
        if pretrained:
            return AutoModelForCausalLM.from_pretrained(folder, config=config, **kwargs)
        return AutoModelForCausalLM.from_config(config, **kwargs)


def add_lora(network: DualHeadNetwork, lora: Mapping[str, Any]) -> None:
    """Put LoRA adapters into the backbone and freeze the rest of it; the classification head trains besides.

    Args:
        network: changed in place.
        lora: fields of ``peft.LoraConfig``; what is left out is the paper's (E.4).

    Raises:
        UserError: a field or a target module that does not exist.
    """
    import peft

    settings = {**PAPER_LORA, **lora}
    try:
        config = peft.LoraConfig(**settings)
        peft.inject_adapter_in_model(config, network.causal_lm)
    except (TypeError, ValueError) as error:
        raise UserError(f'model.lora: {" ".join(str(error).split())}') from error
    network.lora = settings


def merged_state(network: DualHeadNetwork) -> dict[str, torch.Tensor]:
    """The backbone's weights with the adapters merged in; the network itself is left as it is.

    Returns:
        Names as in ``network.backbone`` without adapters; values share memory where nothing was merged.
    """
    from peft.tuners.lora import LoraLayer

    state = network.backbone.state_dict()
    for name, module in network.backbone.named_modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            assert isinstance(base.weight, torch.Tensor)
            state[f'{name}.base_layer.weight'] = base.weight + module.get_delta_weight('default')  # pyright: ignore
    return {
        name.replace('.base_layer.', '.'): value.detach() for name, value in state.items() if '.lora_' not in name
    }


def rebuild(metadata: Mapping[str, Any]) -> DualHeadNetwork:
    """The network that a checkpoint's metadata describes, on the meta device, without weights.

    Args:
        metadata: of :meth:`ComposerDualHeadClassifier.get_metadata`.
    """
    content = copy.deepcopy(metadata['model']['config']['content'])
    settings = metadata['dhrd']
    config = AutoConfig.for_model(content.pop('model_type'), **content)
    with torch.device('meta'):
        causal_lm = AutoModelForCausalLM.from_config(config)
        network = DualHeadNetwork(
            causal_lm, len(settings['label_names']), settings['head'], settings['pooling'], settings['dropout']
        )
        if settings.get('lora'):
            add_lora(network, settings['lora'])
    return network


def freeze(module: nn.Module) -> None:
    """Train nothing of a module."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
