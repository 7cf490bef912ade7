"""Dual-Head Reasoning Distillation for MosaicML Composer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss
    from dhrd_plugin.callbacks.drop_reasoning_head import DropReasoningHead
    from dhrd_plugin.callbacks.gradient_comparison import GradientComparison
    from dhrd_plugin.config import load_config
    from dhrd_plugin.data.collation import TripletCollator
    from dhrd_plugin.data.rationale_collator import RationaleCollator
    from dhrd_plugin.data.shards import write_triplets
    from dhrd_plugin.data.streaming import StreamingTripletDataset
    from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
    from dhrd_plugin.models.network import DualHeadNetwork
    from dhrd_plugin.models.surgery import apply_reasoning_head
    from dhrd_plugin.training import train

_WHERE = {
    'AuxiliaryReasoningLoss': 'algorithms.auxiliary_reasoning_loss',
    'ComposerDualHeadClassifier': 'models.composer_model',
    'DropReasoningHead': 'callbacks.drop_reasoning_head',
    'DualHeadNetwork': 'models.network',
    'GradientComparison': 'callbacks.gradient_comparison',
    'RationaleCollator': 'data.rationale_collator',
    'StreamingTripletDataset': 'data.streaming',
    'TripletCollator': 'data.collation',
    'apply_reasoning_head': 'models.surgery',
    'load_config': 'config',
    'train': 'training',
    'write_triplets': 'data.shards',
}

__all__ = [
    'AuxiliaryReasoningLoss',
    'ComposerDualHeadClassifier',
    'DropReasoningHead',
    'DualHeadNetwork',
    'GradientComparison',
    'RationaleCollator',
    'StreamingTripletDataset',
    'TripletCollator',
    'apply_reasoning_head',
    'load_config',
    'train',
    'write_triplets',
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing the package must not cost what torch and Composer cost.
    if name not in _WHERE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_WHERE[name]}'), name)
