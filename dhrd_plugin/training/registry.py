"""Which class a name in the YAML stands for, and whether its arguments fit, before anything is built."""

import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from dhrd_plugin.arguments import check_arguments
from dhrd_plugin.errors import UserError, nearest, user_errors

# Sections of the YAML whose parts third parties add through llm-foundry's entry points.
_ENTRY_POINTS = {
    'algorithms': 'llmfoundry_algorithms',
    'callbacks': 'llmfoundry_callbacks',
    'loggers': 'llmfoundry_loggers',
}

_REFUSALS = (TypeError, ValueError, ArithmeticError, LookupError, AssertionError)  # of constructors
_CHOICES = {'gradient_clipping': {'clipping_type': ('norm', 'value', 'adaptive')}}  # Composer asks in the first batch
_EXTRAS = ('mlflow', 'tensorboard', 'wandb')  # loggers whose packages are an extra of that name


# Classes whose name does not turn into words by its capitals, and names as llm-foundry has them.
_NAMES = {
    'AdamW': 'adamw',
    'DecoupledAdamW': 'decoupled_adamw',
    'DecoupledSGDW': 'decoupled_sgdw',
    'ExportForInferenceCallback': 'export_for_inference',
    'CosineAnnealingScheduler': 'cosine',
    'CosineAnnealingWithWarmupScheduler': 'cosine_with_warmup',
    'CosineAnnealingWarmRestartsScheduler': 'cosine_warm_restarts',
    'MLFlowLogger': 'mlflow',
    'NaNMonitor': 'nan_monitor',
    'WandBLogger': 'wandb',
}


def _name(part: type) -> str:
    words = re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', part.__name__).lower()
    return _NAMES.get(part.__name__, words.removesuffix('_scheduler').removesuffix('_logger'))


@functools.cache
def parts(section: str) -> dict[str, Any]:
    """The classes (or entry points of third parties) that a section of the YAML may name.

    Args:
        section: ``algorithms``, ``callbacks``, ``loggers``, ``optimizer`` or ``scheduler``.
    """
    import composer.algorithms
    import composer.callbacks
    import composer.loggers
    import composer.optim
    import torch
    from composer.core import Algorithm, Callback

    from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss
    from dhrd_plugin.callbacks.drop_reasoning_head import DropReasoningHead
    from dhrd_plugin.callbacks.gradient_comparison import GradientComparison
    from dhrd_plugin.callbacks.stoppers import EarlyStopper, ThresholdStopper
    from dhrd_plugin.training.mlflow_logger import MLFlowLogger

    ours = {  # one of a name that Composer has stands in the place of its
        'algorithms': [AuxiliaryReasoningLoss],
        'callbacks': [DropReasoningHead, GradientComparison, EarlyStopper, ThresholdStopper],
        'loggers': [MLFlowLogger],
    }
    torchs = {'optimizer': [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD]}
    module, base = {
        'algorithms': (composer.algorithms, Algorithm),
        'callbacks': (composer.callbacks, Callback),
        'loggers': (composer.loggers, composer.loggers.LoggerDestination),
        'optimizer': (composer.optim, torch.optim.Optimizer),
        'scheduler': (composer.optim, composer.optim.ComposerScheduler),
    }[section]
    public = [getattr(module, name) for name in module.__all__]
    found = [part for part in public if inspect.isclass(part) and issubclass(part, base) and part is not base]
    theirs = entry_points(group=_ENTRY_POINTS[section]) if section in _ENTRY_POINTS else ()
    return {entry.name: entry for entry in theirs} | {
        _name(part): part for part in found + ours.get(section, []) + torchs.get(section, [])
    }


def _load(section: str, name: str, key: str) -> type:
    known = parts(section)
    if name not in known:
        raise UserError(f'{key}: unknown name {name!r}; {nearest(name, sorted(known))}')
    part = known[name]
    return part if inspect.isclass(part) else part.load()  # pyright: ignore


def check(section: str, name: str, kwargs: Mapping[str, Any], key: str, given: Iterable[str] = ()) -> None:
    """Hold a part's arguments against its constructor; see :func:`~dhrd_plugin.arguments.check_arguments`."""
    check_arguments(_load(section, name, key), kwargs, key, given)
    for argument, known in _CHOICES.get(name, {}).items():
        if kwargs.get(argument) not in known:
            raise UserError(f'{key}.{argument}: found {kwargs.get(argument)!r}; {nearest(kwargs.get(argument), known)}')


def build(section: str, name: str, kwargs: Mapping[str, Any], key: str, *args: Any) -> Any:
    """Make a part; what its constructor says of its arguments becomes one line. ``args`` come before ``kwargs``."""
    part = _load(section, name, key)
    try:
        with user_errors(key, *_REFUSALS):
            return part(*args, **kwargs)
    except ImportError as error:
        package = f"'dhrd-plugin[{name}]'" if name in _EXTRAS else error.name or name
        raise UserError(f'{key}: a package that it needs is not installed; pip install {package}') from error


def build_named(section: str, settings: Mapping[str, Any], key: str, *args: Any) -> Any:
    """Make the optimizer or scheduler that ``settings`` name, with the rest of them as its arguments."""
    kwargs = {name: value for name, value in settings.items() if name != 'name'}
    return build(section, settings['name'], kwargs, key, *args)


def build_parts(section: str, parts: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Make the parts of a section, by their names; a ``schedule`` among their arguments is made first."""
    built = []
    for name, kwargs in parts.items():
        key = f'{section}.{name}'
        if kwargs.get('schedule') is not None:
            kwargs = {**kwargs, 'schedule': build_named('scheduler', kwargs['schedule'], f'{key}.schedule')}
        built.append(build(section, name, kwargs, key))
    return built
