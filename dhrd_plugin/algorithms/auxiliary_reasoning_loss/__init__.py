"""The reasoning head's loss, added to a classifier's training; see README.md beside this file."""

from dhrd_plugin.algorithms.auxiliary_reasoning_loss.auxiliary_reasoning_loss import (
    AuxiliaryReasoningLoss,
    scheduled_alpha,
)

__all__ = ['AuxiliaryReasoningLoss', 'scheduled_alpha']
