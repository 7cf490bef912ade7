"""Write the slim classifier: backbone and classification head, no LM head, no adapters, no pickle."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.models import HuggingFaceModel
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig

from dhrd_plugin.files import replace_folder, staged
from dhrd_plugin.models import heads, slim
from dhrd_plugin.models.build import merged_state, rebuild
from dhrd_plugin.models.network import DualHeadNetwork


def write_slim(
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    out: str | Path,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a slim classifier from a model's full state.

    A ``linear`` head over the ``last`` token becomes the backbone's plain Hugging Face
    ``...ForSequenceClassification``. Any other becomes a
    :class:`~dhrd_plugin.models.slim.SlimClassifier` whose code travels in the folder and loads with
    ``trust_remote_code=True``. Neither needs this package.

    Args:
        metadata: of :meth:`ComposerDualHeadClassifier.get_metadata`.
        state: the network's whole state dict, on the CPU, names as in :class:`DualHeadNetwork`.
        out: the folder; appears whole or not at all, and replaces what stood there at the end.
        dtype: of the weights. Default: as they are.

    Returns:
        ``out``.
    """
    network = rebuild(metadata)
    network.load_state_dict(dict(state), assign=True)
    config, weights = slim_classifier(network, metadata)
    if dtype is not None:
        weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
        config.torch_dtype = dtype
    out = Path(out)
    with staged(out) as folder:
        _write_tokenizer(metadata, config, folder)
        config.save_pretrained(folder)
        if isinstance(config, slim.SlimClassifierConfig):
            for module in (slim, heads):
                shutil.copy(str(module.__file__), folder)
        contiguous = {name: value.contiguous() for name, value in weights.items()}
        save_torch_state_dict(contiguous, folder, metadata={'format': 'pt'}, force_contiguous=False)
        replace_folder(folder, out)
    return out


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
