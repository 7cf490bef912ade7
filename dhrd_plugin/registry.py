"""Which class a name in the YAML stands for, and whether its arguments fit, before anything is built."""

import functools
import inspect
import re
import typing
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from dhrd_plugin.errors import UserError, nearest

# Sections of the YAML whose parts third parties add through llm-foundry's entry points.
_ENTRY_POINTS = {
    'algorithms': 'llmfoundry_algorithms',
    'callbacks': 'llmfoundry_callbacks',
    'loggers': 'llmfoundry_loggers',
}

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

    ours = {'algorithms': [AuxiliaryReasoningLoss], 'callbacks': [DropReasoningHead, GradientComparison]}
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


def check(section: str, name: str, kwargs: Mapping[str, Any], key: str, given: Iterable[str] = ()) -> type:
    """Hold a part's arguments against its constructor.

    Args:
        section: see :func:`parts`.
        name: the part's name in the YAML.
        kwargs: its arguments.
        key: where it stands in the YAML, for messages.
        given: arguments that are not the YAML's to give (``params`` of an optimizer).

    Returns:
        The class.

    Raises:
        UserError: an unknown name or argument, a missing one, a wrong type.
    """
    import typeguard

    part = _load(section, name, key)
    signature = inspect.signature(part.__init__)
    parameters = {n: p for n, p in list(signature.parameters.items())[1:] if n not in given}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    try:
        hints = typing.get_type_hints(part.__init__)
    except Exception:  # annotations that only a type checker can resolve say nothing at run time
        hints = {}
    for argument, value in kwargs.items():
        if argument not in named and not open_ended:
            raise UserError(f'{key}.{argument}: unknown key; {nearest(argument, sorted(named))}')
        if argument in hints:
            try:
                typeguard.check_type(value, hints[argument])
            except typeguard.TypeCheckError:
                wanted = inspect.formatannotation(hints[argument]).replace('typing.', '')
                raise UserError(f'{key}.{argument}: found {value!r}; expected {wanted}') from None
    for argument, parameter in named.items():
        if parameter.default is parameter.empty and argument not in kwargs:
            raise UserError(f'{key}.{argument}: missing; {part.__name__} needs it')
    return part


def build(section: str, name: str, kwargs: Mapping[str, Any], key: str, *args: Any) -> Any:
    """Make a part; what its constructor says of its arguments becomes one line.

    Args:
        section: see :func:`parts`.
        name: the part's name in the YAML.
        kwargs: its arguments.
        key: where it stands in the YAML.
        *args: positional arguments (the optimizer's parameters).
    """
    part = _load(section, name, key)
    try:
        return part(*args, **kwargs)
    except UserError:
        raise
    except ImportError as error:
        package = f"'dhrd-plugin[{name}]'" if name in _EXTRAS else error.name or name
        raise UserError(f'{key}: a package that it needs is not installed; pip install {package}') from error
    except (TypeError, ValueError) as error:
        raise UserError(f'{key}: {" ".join(str(error).split())}') from error


def parse_time(text: str, key: str) -> Any:
    """A :class:`composer.Time` of a time string.

    Raises:
        UserError: naming the key.
    """
    from composer import Time

    try:
        return Time.from_timestring(text)
    except ValueError:
        raise UserError(f"{key}: found {text!r}; expected a Composer time string such as '2ep' or '40ba'") from None
