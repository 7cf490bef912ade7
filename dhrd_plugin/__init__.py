"""Dual-Head Reasoning Distillation for MosaicML Composer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss as AuxiliaryReasoningLoss
    from dhrd_plugin.callbacks.drop_reasoning_head import DropReasoningHead as DropReasoningHead
    from dhrd_plugin.callbacks.gradient_comparison import GradientComparison as GradientComparison
    from dhrd_plugin.data.collator import TripletCollator as TripletCollator
    from dhrd_plugin.data.rationale_collator import RationaleCollator as RationaleCollator
    from dhrd_plugin.data.shards import write_triplets as write_triplets
    from dhrd_plugin.export.load import load_classifier as load_classifier
    from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier as ComposerDualHeadClassifier
    from dhrd_plugin.models.network import DualHeadNetwork as DualHeadNetwork
    from dhrd_plugin.models.reasoning_head import apply_reasoning_head as apply_reasoning_head
    from dhrd_plugin.streams.dataset import StreamingTripletDataset as StreamingTripletDataset
    from dhrd_plugin.training.config import load_config as load_config
    from dhrd_plugin.training.run import train as train

__version__ = '0.2.0'

_WHERE = {
    'AuxiliaryReasoningLoss': 'algorithms.auxiliary_reasoning_loss',
    'ComposerDualHeadClassifier': 'models.composer_model',
    'DropReasoningHead': 'callbacks.drop_reasoning_head',
    'DualHeadNetwork': 'models.network',
    'GradientComparison': 'callbacks.gradient_comparison',
    'RationaleCollator': 'data.rationale_collator',
    'StreamingTripletDataset': 'streams.dataset',
    'TripletCollator': 'data.collator',
    'apply_reasoning_head': 'models.reasoning_head',
    'load_classifier': 'export.load',
    'load_config': 'training.config',
    'train': 'training.run',
    'write_triplets': 'data.shards',
}
__all__ = [*_WHERE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing the package must not cost what torch and Composer cost.
    if name not in _WHERE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_WHERE[name]}'), name)
