"""Load a slim classifier, without Composer."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from dhrd_plugin.models.slim import SlimClassifier, SlimClassifierConfig


def load_slim(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model in a folder of :func:`~dhrd_plugin.models.export.write_slim`; code in the folder is never run.

    Args:
        folder: with a ``config.json``.
        **kwargs: of ``from_pretrained``.
    """
    config = load_slim_config(folder)
    kind = SlimClassifier if isinstance(config, SlimClassifierConfig) else AutoModelForSequenceClassification
    return kind.from_pretrained(folder, config=config, **kwargs).eval()


def load_slim_config(folder: str | Path) -> PretrainedConfig:
    """The config of such a model; code in the folder is never run."""
    kind = json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8')).get('model_type')
    return (SlimClassifierConfig if kind == SlimClassifierConfig.model_type else AutoConfig).from_pretrained(folder)
