"""Where transformers 4 and 5 differ, so that no other file asks which one is installed."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

try:
    from transformers import initialization as _initialization  # pyright: ignore
except ImportError:
    from transformers import modeling_utils as _initialization
no_init_weights: Any = _initialization.no_init_weights

# The class of a tokenizer that is its tokenizer.json alone: to transformers 5, and to both.
_PLAIN = {'TokenizersBackend': 'PreTrainedTokenizerFast'}

# What a config and `from_pretrained` call the type of the weights.
DTYPE = 'dtype' if hasattr(PretrainedConfig, 'torch_dtype') else 'torch_dtype'

# For `from_pretrained`, to tell what it did not find or could not use. What of 4 raises for a weight of another size
# says so; what of 5 does says that its log tells more.
INFORMED = {'output_loading_info': True, **({'ignore_mismatched_sizes': True} if DTYPE == 'dtype' else {})}


def misfit_of(info: Mapping[str, Any]) -> str | None:
    """What to say of weights of another size, if there are any in what ``from_pretrained`` tells."""
    names = sorted(name for name, *_ in info['mismatched_keys'])
    return f'size mismatch for {names[0]}; expected the shape that its config.json asks for' if names else None


def config_from(content: Mapping[str, Any]) -> PretrainedConfig:
    """The config of which ``content`` is the ``config.json``.

    Args:
        content: may hold infinity as transformers 5 writes it, ``{'__float__': 'Infinity'}``.
    """
    decode = getattr(PretrainedConfig, '_decode_special_floats', dict)
    return AutoConfig.for_model(**decode(copy.deepcopy(dict(content))))


def pad_token_of(config: PretrainedConfig) -> int | None:
    """Its ``pad_token_id``; to transformers 5 it is not a key of every config."""
    return getattr(config, 'pad_token_id', None)


def turning_rope(config: PretrainedConfig) -> tuple[int, str] | None:
    """Beyond how many tokens RoPE turns every position of a batch otherwise, and its kind; None: never."""
    found = getattr(config, 'rope_parameters', None) or getattr(config, 'rope_scaling', None) or {}
    limits = []
    for rope in [found, *(part for part in found.values() if isinstance(part, Mapping))]:  # one for each kind of layer
        kind = rope.get('rope_type', rope.get('type')) or ''
        if kind == 'longrope':
            beside = getattr(config, 'original_max_position_embeddings', None) or config.max_position_embeddings
            limits.append((rope.get('original_max_position_embeddings') or beside, kind))
        elif 'dynamic' in kind:
            limits.append((config.max_position_embeddings, kind))
    return min(limits, default=None)


def tokenizer_class(name: Any) -> Any:
    """The name of a tokenizer's class as both know it."""
    return _PLAIN.get(name, name)


def is_taken_for_another(tokenizer: Any, config: PretrainedConfig) -> bool:
    """Whether transformers 5 would load another one from beside this config: that of a qwen2 is Qwen's own to it."""
    return config.model_type == 'qwen2' and not type(tokenizer).__name__.startswith('Qwen2Tokenizer')


def save_tokenizer(tokenizer: Any, folder: Path, **kwargs: Any) -> None:
    """``tokenizer.save_pretrained(folder, **kwargs)``, for either to load."""
    tokenizer.save_pretrained(folder, **kwargs)
    path = folder / 'tokenizer_config.json'
    content = json.loads(path.read_text(encoding='utf-8'))
    content['tokenizer_class'] = tokenizer_class(content['tokenizer_class'])
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
