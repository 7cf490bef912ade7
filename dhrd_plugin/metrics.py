"""The paper's metrics (arXiv:2509.21487, Table 4), and those of several labels, by the names of a task's template."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics import classification as of_torchmetrics
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MultilabelF1Score
from torchmetrics.utilities import dim_zero_cat

from dhrd_plugin.problem_type import decide


class AnswerF1(BinaryF1Score):
    """F1 of the second of two classes, the positive one, over all rows: MultiRC's F1a."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch: [B, 2] logits, [B] class indices."""
        super().update(preds.argmax(-1), target)


class ExactMatch(Metric):
    """Share of the groups whose every row is right: MultiRC's EM, where a group is a question.

    A group counts once wherever its rows are: in several batches, on several ranks, repeated by a
    sampler. A value between 0 and 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    groups: list[Tensor]
    right: list[Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state('groups', default=[], dist_reduce_fx='cat')
        self.add_state('right', default=[], dist_reduce_fx='cat')
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        # A rank that gets no row must still gather integers: torchmetrics would make up a float.
        self.groups.append(torch.empty(0, dtype=torch.int64, device=self.device))
        self.right.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def update(self, preds: Tensor, target: Tensor, group: Tensor) -> None:
        """Take in a batch: [B, K] logits, [B] class indices, [B] an integer for each row's group."""
        self.groups.append(group)
        self.right.append((preds.argmax(-1) == target).long())

    def compute(self) -> Tensor:
        """The share; NaN where no row was seen."""
        groups, right = dim_zero_cat(self.groups), dim_zero_cat(self.right)
        wrong = groups[right == 0].unique().numel()
        count = groups.unique().numel()
        return torch.tensor((count - wrong) / count if count else torch.nan, device=self.device)


class _OfDecisions(Metric):
    """Counts what is answered: torchmetrics' own threshold has a probability of exactly one half as a no."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch: [B, K] probabilities, [B, K] zeros and ones."""
        super().update(decide(preds, multi_label=True).long(), target)


class MultilabelExactMatch(_OfDecisions, of_torchmetrics.MultilabelExactMatch):
    """Share of the rows whose decisions are all right."""


class MultilabelMicroF1(_OfDecisions, MultilabelF1Score):
    """F1 of all decisions, each row's on each class, together. A name of its own: metrics are logged by their class."""

    def __init__(self, num_labels: int, **options: Any):
        super().__init__(num_labels, average='micro', **options)


class MultilabelMacroF1(_OfDecisions, MultilabelF1Score):
    """The mean over the classes of their F1."""

    def __init__(self, num_labels: int, **options: Any):
        super().__init__(num_labels, average='macro', **options)


def build_metrics(names: Iterable[str], num_labels: int, multi_label: bool = False, **options: Any) -> list[Metric]:
    """Metrics over logits [B, K] and class indices [B]; multi-label over probabilities [B, K] and zeros and ones.

    Args:
        names: of ``accuracy``, ``macro_f1``, ``f1a`` (MultiRC, two classes) and ``em`` (MultiRC, which
            needs each row's group besides).
        num_labels: K.
        multi_label: names are of ``micro_f1``, ``macro_f1`` and ``exact_match``. Default: ``False``.
        **options: of every :class:`torchmetrics.Metric`, such as ``sync_on_compute``.

    Returns:
        One metric for each name, in their order.
    """
    one_label: dict[str, Any] = {
        'accuracy': lambda: MulticlassAccuracy(num_classes=num_labels, average='micro', **options),
        'macro_f1': lambda: MulticlassF1Score(num_classes=num_labels, average='macro', **options),
        'f1a': lambda: AnswerF1(**options),
        'em': lambda: ExactMatch(**options),
    }
    several: dict[str, Any] = {
        'micro_f1': lambda: MultilabelMicroF1(num_labels, **options),
        'macro_f1': lambda: MultilabelMacroF1(num_labels, **options),
        'exact_match': lambda: MultilabelExactMatch(num_labels, **options),
    }
    makers = several if multi_label else one_label
    return [makers[name]() for name in names]
