"""The ``ComposerModel`` around the dual-head network."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from composer.models import HuggingFaceModel
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from dhrd_plugin.errors import UserError
from dhrd_plugin.losses import IGNORE_INDEX, binary_cross_entropy, soft_cross_entropy, weighted_mean
from dhrd_plugin.metrics import ExactMatch, build_metrics
from dhrd_plugin.models.network import DualHeadNetwork, DualHeadOutput
from dhrd_plugin.models.versions import pad_token_of
from dhrd_plugin.problem_type import to_probabilities

RETURN_REASONING_LOSS = 'return_reasoning_loss'
_INPUTS = ('input_ids', 'attention_mask', 'pool_index', 'reasoning_labels', RETURN_REASONING_LOSS, 'spans')


def describe(model: HuggingFaceModel) -> dict[str, Any]:
    """``get_metadata`` of Composer's ``HuggingFaceModel``, which fails where the tokenizer has several chat templates.

    transformers writes those to a folder of their own, unless they are to stay in the tokenizer's config.
    """
    tokenizer: Any = model.tokenizer
    if not isinstance(getattr(tokenizer, 'chat_template', None), dict):
        return HuggingFaceModel.get_metadata(model)
    tokenizer.save_pretrained = partial(tokenizer.save_pretrained, save_jinja_files=False)
    try:
        return HuggingFaceModel.get_metadata(model)
    finally:
        del tokenizer.save_pretrained


class ComposerDualHeadClassifier(HuggingFaceModel):
    """Trains the pooled classifier; with :class:`~dhrd_plugin.AuxiliaryReasoningLoss`, both heads.

    ``loss`` is the classification loss alone (Eq. 2), so without the algorithm this *is* the pooled
    baseline, and rationale tokens are neither read nor run. It is a Composer ``HuggingFaceModel``
    so that Composer stores its config and tokenizer in every checkpoint.

    Args:
        network: the dual-head network.
        tokenizer: stored in checkpoints and exports. Default: none.
        label_names: the K class names, in the order of the logits. Default: ``LABEL_0`` and so on.
        metrics: torchmetrics to compute, shown by the names of their classes. Default: accuracy and
            macro-F1. :class:`~dhrd_plugin.metrics.ExactMatch` is left out of training, whose batches
            hold no whole groups; for evaluation it needs a collator with ``groups=True``.
        class_weights: K weights of the cross-entropy; multi-label of the rows that have the class. Default: none (ours,
            not the paper's).
        label_smoothing: of the classification loss. Default: 0 (ours, not the paper's).
        soft_label_weight: of a row's probabilities beside its label, see
            :func:`~dhrd_plugin.losses.soft_cross_entropy`. Default: 0.5 (ours, not the paper's).
        info: plain JSON to store in checkpoints and exports besides: markers, task, LoRA. Default: nothing.
        multi_label: a row has any number of classes: the loss is
            :func:`~dhrd_plugin.losses.binary_cross_entropy` (ours, not the paper's). Default: ``False``.

    Raises:
        ValueError: ``label_names`` does not have K names.
    """

    def __init__(
        self,
        network: DualHeadNetwork,
        tokenizer: PreTrainedTokenizerBase | None = None,
        label_names: Sequence[str] | None = None,
        metrics: Sequence[Metric] | None = None,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        info: Mapping[str, Any] | None = None,
        soft_label_weight: float = 0.5,
        multi_label: bool = False,
    ):
        num_labels = network.num_labels
        self.label_names = list(label_names or (f'LABEL_{i}' for i in range(num_labels)))
        if len(self.label_names) != num_labels:
            raise ValueError(f'label_names: found {len(self.label_names)} names for {num_labels} classes')
        self.info = dict(info or {})
        self.label_smoothing = label_smoothing
        self.soft_label_weight = soft_label_weight
        self.multi_label = multi_label
        if metrics is None:
            names = ['micro_f1' if multi_label else 'accuracy', 'macro_f1']
            metrics = build_metrics(names, num_labels, multi_label)
        super().__init__(
            network,  # pyright: ignore[reportArgumentType]
            tokenizer,  # pyright: ignore[reportArgumentType]
            use_logits=True,
            metrics=[metric for metric in metrics if not isinstance(metric, ExactMatch)],
            eval_metrics=list(metrics),
            shift_labels=False,
            allow_embedding_resizing=True,
        )
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer('class_weights', weights, persistent=False)

    @property
    def network(self) -> DualHeadNetwork:
        """The dual-head network."""
        return self.model  # pyright: ignore[reportReturnType]

    def forward(self, batch: Mapping[str, Any]) -> DualHeadOutput:
        """Run the network on a batch of :class:`~dhrd_plugin.TripletCollator`."""
        return self.network(**{key: batch[key] for key in _INPUTS if key in batch})

    def loss(self, outputs: DualHeadOutput, batch: Mapping[str, Any]) -> Tensor:  # pyright: ignore
        """Compute the classification loss (Eq. 2), a mean over the B samples, weighted where the batch has weights."""
        assert outputs.logits is not None
        if self.class_weights is not None:  # it stands beside the network, which alone FSDP moves
            self.class_weights = self.class_weights.to(outputs.logits.device)
        logits, labels, weights, smoothing = outputs.logits, batch['labels'], self.class_weights, self.label_smoothing
        if self.multi_label:
            losses = binary_cross_entropy(logits, labels, weights, smoothing)
        else:
            soft = batch.get('label_probabilities')
            losses = soft_cross_entropy(logits, labels, soft, self.soft_label_weight, weights, smoothing)
        return weighted_mean(losses, batch.get('classification_weight'))

    def eval_forward(self, batch: Mapping[str, Any], outputs: DualHeadOutput | None = None) -> Tensor:  # pyright: ignore
        """Compute [B, K] logits without reading the rationale."""
        if not isinstance(outputs, DualHeadOutput):  # None, or what Composer's FreeOutputs leaves
            outputs = self.forward({k: v for k, v in batch.items() if k != RETURN_REASONING_LOSS})
        assert outputs.logits is not None
        return outputs.logits

    def update_metric(self, batch: Mapping[str, Any], outputs: Tensor, metric: Metric) -> dict:
        """Update one metric with a batch's logits [B, K]; rows without a label do not count."""
        taken = [outputs, batch['labels']]
        if self.multi_label:  # torchmetrics guesses whether it has logits
            taken = [to_probabilities(outputs, multi_label=True), batch['labels'].long()]
        if isinstance(metric, ExactMatch):
            if 'group' not in batch:
                raise UserError(
                    'metrics: ExactMatch found no `group` in the batch; expected TripletCollator(groups=True)'
                )
            taken.append(batch['group'])
        if 'label_probabilities' in batch:  # only rows with these may lack a label
            known = batch['labels'] != IGNORE_INDEX
            if not known.any():
                return {}
            taken = [values[known.to(values.device)] for values in taken]
        metric.update(*(values.to(metric.device) for values in taken))
        return {}

    def get_metadata(self) -> dict[str, Any]:
        """Describe the model in a checkpoint: config, tokenizer, heads, labels, markers, LoRA."""
        network = self.network
        metadata = describe(self)
        metadata['dhrd'] = {
            'label_names': self.label_names,
            'head': network.classifier.kind,
            'pooling': network.pooling,
            'dropout': network.classifier.dropout.p,
            'norm': network.classifier.norm is not None,
            'multi_label': self.multi_label,
            'lora': network.lora,
            'pad_token_id': pad_token_of(self.config) if self.tokenizer is None else self.tokenizer.pad_token_id,
            **self.info,
        }
        return metadata
