"""The slim classifier where Hugging Face has no class that answers alike: it pools by the attention mask.

This file and ``heads.py`` travel with the export and are all that it needs besides transformers:
``AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)``.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .heads import POOLINGS, ClassificationHead, last_hidden_state, last_real_index, pool


class SlimClassifierConfig(PretrainedConfig):
    """A backbone's config, and the head on top of it; ``hidden_size`` is the width of what the head reads.

    A model type of its own, so that a loader without ``trust_remote_code`` stops instead of
    building the backbone's stock classifier with a random head.
    """

    model_type = 'dhrd_slim_classifier'
    sub_configs = {'backbone': AutoConfig}  # pyright: ignore

    def __init__(
        self,
        backbone=None,
        head='mlp',
        pooling='last',
        classifier_dropout=0.0,
        hidden_size=None,
        classifier_norm=False,
        **kwargs,
    ):
        if isinstance(backbone, dict):
            backbone = AutoConfig.for_model(**backbone)
        self.backbone = backbone
        self.head = head
        self.pooling = pooling
        self.classifier_dropout = classifier_dropout
        self.classifier_norm = classifier_norm
        # That of the backbone's own config is not always the width of its states (OPT-350m).
        self.hidden_size = hidden_size or getattr(backbone, 'hidden_size', None)
        super().__init__(**kwargs)


class SlimClassifier(PreTrainedModel):
    """Backbone, pooling, classification head; no LM head."""

    config_class = SlimClassifierConfig
    base_model_prefix = 'backbone'
    _supports_sdpa = True
    _supports_flash_attn_2 = True

    def __init__(self, config):
        super().__init__(config)
        if config.pooling not in POOLINGS:
            raise ValueError(f'pooling: found {config.pooling!r}; expected one of {POOLINGS}')
        self.num_labels = config.num_labels
        self.backbone = AutoModel.from_config(config.backbone)
        if getattr(self.backbone, 'pooler', None) is not None:
            self.backbone.pooler = None  # of BERT's kind: a language model has none
        self.classifier = ClassificationHead(
            config.hidden_size, config.num_labels, config.head, config.classifier_dropout, norm=config.classifier_norm
        )
        self.post_init()  # without it transformers 5 does not load it

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        """[B, S] token ids to [B, K] logits; the loss too where ``labels``, [B] or of several [B, K], are given."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = last_hidden_state(self.backbone, input_ids, attention_mask)
        pooled = pool(hidden, attention_mask, last_real_index(attention_mask), self.config.pooling)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None and self.config.problem_type == 'multi_label_classification':
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore
