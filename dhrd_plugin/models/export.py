"""Write the slim classifier: backbone and classification head, no LM head, no adapters, no pickle."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.models import HuggingFaceModel
from composer.models.huggingface import maybe_get_underlying_model
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from dhrd_plugin.errors import UserError
from dhrd_plugin.files import replace_folder, staged
from dhrd_plugin.models import heads, slim
from dhrd_plugin.models.build import merged_state, rebuild
from dhrd_plugin.models.card import model_card
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.load import load_slim
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.onnx import NAME, write_onnx
from dhrd_plugin.models.surgery import is_sequence_classifier

_NETWORK = 'model.'  # its name inside a HuggingFaceModel
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def write_slim(
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    out: str | Path,
    dtype: torch.dtype | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    onnx: bool = False,
) -> Path:
    """Write a slim classifier from a model's full state.

    A ``linear`` head over the ``last`` token becomes the backbone's plain Hugging Face
    ``...ForSequenceClassification``. Any other becomes a
    :class:`~dhrd_plugin.models.slim.SlimClassifier` whose code travels in the folder and loads with
    ``trust_remote_code=True``. Neither needs this package.

    A model that :func:`~dhrd_plugin.apply_reasoning_head` was applied to becomes the stock classifier
    that it was, adapters merged.

    Args:
        metadata: of :meth:`ComposerDualHeadClassifier.get_metadata`, or of a ``HuggingFaceModel``.
        state: the whole state dict of the model inside, on the CPU, names as in that model.
        out: the folder; appears whole or not at all, and replaces what stood there at the end.
        dtype: of the weights. Default: as they are.
        metrics: for the model card, by evaluation set and name. Default: none are known.
        onnx: write ``model.onnx`` besides, in fp32.

    Returns:
        ``out``.
    """
    if 'dhrd' in metadata:
        network = rebuild(metadata)
        network.load_state_dict(dict(state), assign=True)
        config, weights = slim_classifier(network, metadata)
    else:
        config, weights = stock_classifier(metadata, state)
    if dtype is not None:
        weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
        config.torch_dtype = dtype
    out = Path(out)
    with staged(out) as folder:
        _write_tokenizer(metadata, config, folder)
        _write_model(config, weights, folder)
        card = model_card(metadata, metrics, isinstance(config, slim.SlimClassifierConfig))
        (folder / 'README.md').write_text(card, encoding='utf-8')
        if onnx:
            write_onnx(load_slim(folder, torch_dtype=torch.float32, attn_implementation='eager'), folder / NAME)
        replace_folder(folder, out)
    return out


def _write_model(config: PretrainedConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    config.save_pretrained(folder)
    if isinstance(config, slim.SlimClassifierConfig):
        for module in (slim, heads):
            shutil.copy(str(module.__file__), folder)
    owned = {name: _owned(value) for name, value in weights.items()}
    try:
        save_torch_state_dict(owned, folder, metadata={'format': 'pt'}, force_contiguous=False)
    except SafetensorError as error:  # what the operating system refused, in Rust's words
        raise UserError(f'{folder}: cannot be written: {error}') from error
    for path in folder.glob('*.safetensors'):
        shutil.copymode(folder / 'config.json', path)  # safetensors lets nobody else read


def slim_classifier(
    network: DualHeadNetwork,
    metadata: Mapping[str, Any],
) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Config and weights of the slim classifier."""
    settings = metadata['dhrd']
    backbone = network.config
    labels = settings['label_names']
    common = {
        'id2label': dict(enumerate(labels)),
        'label2id': {name: index for index, name in enumerate(labels)},
        'pad_token_id': settings['pad_token_id'],
        'dhrd': {key: settings.get(key) for key in ('task', 'markers', 'max_seq_len')},
    }
    weights = merged_state(network)
    head = network.classifier.state_dict()
    stock = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(backbone), None)
    if network.classifier.kind == 'linear' and network.pooling == 'last' and stock is not None:
        architecture = stock.__name__  # pyright: ignore
        config = type(backbone)(**{**backbone.to_dict(), **common, 'architectures': [architecture]})
        prefix = network.causal_lm.base_model_prefix
        return config, {f'{prefix}.{k}': v for k, v in weights.items()} | {'score.weight': head['out_proj.weight']}
    config = slim.SlimClassifierConfig(
        backbone=backbone,
        head=network.classifier.kind,
        pooling=network.pooling,
        classifier_dropout=network.classifier.dropout.p,
        architectures=['SlimClassifier'],
        auto_map={
            'AutoConfig': 'slim.SlimClassifierConfig',
            'AutoModelForSequenceClassification': 'slim.SlimClassifier',
        },
        torch_dtype=backbone.torch_dtype,
        **common,
    )
    return config, {f'backbone.{k}': v for k, v in weights.items()} | {f'classifier.{k}': v for k, v in head.items()}


def stock_classifier(
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Config and weights of a Hugging Face classifier, without the LM head that it was given."""
    content = dict(metadata['model']['config']['content'])
    config = AutoConfig.for_model(content.pop('model_type'), **content)
    config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]  # pyright: ignore
    weights = {name: value for name, value in state.items() if 'lm_head' not in name.split('.')}
    if 'peft_config' in metadata['model']:
        weights = _merge_adapters(config, metadata['model']['peft_config']['content'], weights)
    return config, weights


def _merge_adapters(
    config: PretrainedConfig, peft_config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    import peft

    with torch.device('meta'):
        bare = AutoModelForSequenceClassification.from_config(config)
        model: Any = peft.get_peft_model(bare, peft.PeftConfig.from_peft_type(**peft_config))
    # Merging changes weights in place, and these may be the live ones.
    model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return model.merge_and_unload().state_dict()


def network_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the model inside a ``HuggingFaceModel``, by their names there, out of its whole state dict."""
    return {
        name.removeprefix(_NETWORK): value
        for name, value in state.items()
        if name.startswith(_NETWORK) and isinstance(value, Tensor)
    }


def check_exportable(model: nn.Module) -> None:
    """Refuse a model that no classifier can be made of.

    Raises:
        UserError: with its type.
    """
    if isinstance(model, ComposerDualHeadClassifier):
        return
    if not isinstance(model, HuggingFaceModel) or not is_sequence_classifier(maybe_get_underlying_model(model.model)):
        raise UserError(
            f'drop_reasoning_head: found a model of type {type(model).__name__}; expected a ComposerDualHeadClassifier '
            'or a HuggingFaceModel around a ...ForSequenceClassification'
        )


def _owned(value: Tensor) -> Tensor:
    """A contiguous tensor that is all of its storage; FSDP gathers into padded ones, which safetensors refuses."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _write_tokenizer(metadata: Mapping[str, Any], config: PretrainedConfig, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
            dict(metadata), tokenizer_save_dir=scratch
        )
        if tokenizer is None:
            return
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        tokenizer.padding_side = 'right'
        # Without it transformers' pipeline loads no tokenizer for a model type that it does not know.
        config.tokenizer_class = type(tokenizer).__name__
        tokenizer.save_pretrained(folder)
