"""A loader's settings of its shards: ``local``, ``remote``, ``split``, ``streams``, ``dataset``, ``cache_dir``."""

import math
from collections.abc import Mapping
from typing import Any

from streaming import Stream, StreamingDataset
from streaming.base import partition, shuffle
from streaming.base.batching import batching_methods
from streaming.base.util import bytes_to_int, number_abbrev_to_int

from dhrd_plugin.arguments import check_arguments
from dhrd_plugin.errors import UserError, nearest, user_errors
from dhrd_plugin.streams.stream import TripletStream

WEIGHTS = ('proportion', 'repeat', 'choose')
# Of a stream, or of the dataset for all of its streams.
DOWNLOADS = ('download_retry', 'download_timeout', 'validate_hash', 'keep_zip')
# Of both: the type, the least value, and what is expected.
NUMBERS = {
    'download_retry': (int, 1, 'a whole number of 1 or more'),
    'download_timeout': (int | float, math.ulp(0), 'a number of seconds above 0'),
    'proportion': (int | float, 0, 'a number of 0 or more'),
    'repeat': (int | float, 0, 'a number of 0 or more'),
    'choose': (int, 0, 'a whole number of 0 or more'),
}
# Of the dataset: the least number, of the options that are counts.
COUNTS = {
    'cache_limit': 1,
    'epoch_size': 1,
    'initial_physical_nodes': 1,
    'num_canonical_nodes': 1,
    'predownload': 0,
    'replication': 1,
    'sampling_granularity': 1,
    'shuffle_block_size': 1,
}
CHOICES = {
    'shuffle_algo': shuffle.algos,
    'partition_algo': partition.algos,
    'batching_method': batching_methods,
    'sampling_method': ('balanced', 'fixed'),
}
# Options of a StreamingDataset that have another place in a loader.
ELSEWHERE = {
    name: f'belongs to the loader: {name}, without dataset'
    for name in ('remote', 'local', 'streams', 'split', 'shuffle', 'shuffle_seed')
} | {
    'batch_size': 'follows from global_train_batch_size',
    'stream_name': 'is not taken; every stream is one whose shards are checked',
    'stream_config': 'is not taken; every stream is one whose shards are checked',
}


def build_streams(settings: Mapping[str, Any], key: str) -> list[TripletStream]:
    """The streams of the loader ``key``, whose settings :func:`check_settings` has passed."""
    common = {name: settings['dataset'].get(name) for name in DOWNLOADS}
    common |= {name: settings[name] for name in ('split', 'cache_dir')}
    return [
        TripletStream(key=name, **{option: value for option, value in (common | stream).items() if value is not None})
        for name, stream in named_streams(settings, key).items()
    ]


def named_streams(settings: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """The settings of each stream of the loader ``key``, by its key; without ``streams`` the loader is the one."""
    named = {f'{key}.streams.{name}': stream for name, stream in settings['streams'].items()}
    return named or {key: {name: settings[name] for name in ('remote', 'local')}}


def check_settings(settings: Mapping[str, Any], key: str, training: bool = True) -> None:
    """Refuse what Streaming would refuse, or would silently ignore, before anything is fetched.

    Args:
        settings: those of the module's first line, by name.
        key: of the loader, for messages.
        training: whether rows are streamed; otherwise each is read once, by index. Default: ``True``.
    """
    dataset, streams = settings['dataset'], settings['streams']
    both = [name for name in ('remote', 'local') if settings[name] and streams]
    if both:
        raise UserError(f'{key}: found {both[0]} and streams; expected one of them')
    _check_dataset(dataset, f'{key}.dataset', training)
    for name, stream in streams.items():
        _check_stream(stream, f'{key}.streams.{name}', training)
    _check_mixture(streams, f'{key}.streams')
    if dataset.get('epoch_size') and any(stream.get(weight) for stream in streams.values() for weight in WEIGHTS[1:]):
        raise UserError(f'{key}.dataset.epoch_size: found with repeat or choose, which say how long an epoch is')
    if dataset.get('cache_limit') and not all(stream.get('remote') for stream in streams.values() or [settings]):
        raise UserError(f'{key}.dataset.cache_limit: found without a remote; it would delete the only shards')


def _check_dataset(dataset: Mapping[str, Any], key: str, training: bool) -> None:
    downloads = {option: value for option, value in dataset.items() if option in DOWNLOADS}
    others = {option: value for option, value in dataset.items() if option not in DOWNLOADS}
    for option in others:
        if option in ELSEWHERE:
            raise UserError(f'{key}.{option}: {ELSEWHERE[option]}')
    _check_stream_options(downloads, key)
    check_arguments(StreamingDataset, others, key, given=ELSEWHERE)
    if others and not training:
        raise UserError(f'{key}.{next(iter(others))}: found in evaluation; expected one of {", ".join(DOWNLOADS)}')
    for option, known in CHOICES.items():
        if option in others and others[option] not in known:
            raise UserError(f'{key}.{option}: found {others[option]!r}; {nearest(others[option], sorted(known))}')
    for option, least in COUNTS.items():
        _check_count(others.get(option), least, f'{key}.{option}')


def _check_count(value: Any, least: int, key: str) -> None:
    if isinstance(value, str):  # 64k, 10gb
        with user_errors(f'{key}: found {value!r}', Exception):
            value = number_abbrev_to_int(value) if key.endswith('epoch_size') else bytes_to_int(value)
    if isinstance(value, bool) or (value is not None and value < least):
        raise UserError(f'{key}: found {value!r}; expected a whole number of {least} or more')


def _check_stream(stream: Any, key: str, training: bool) -> None:
    if not isinstance(stream, Mapping):
        raise UserError(f'{key}: found {stream!r}; expected a mapping with remote or local')
    _check_stream_options(stream, key)
    if not (stream.get('remote') or stream.get('local')):
        raise UserError(f'{key}: found neither remote nor local')
    weights = [weight for weight in WEIGHTS if stream.get(weight) is not None]
    if weights and not training:
        raise UserError(f'{key}.{weights[0]}: found in evaluation, where every row is read once')
    if len(weights) > 1:
        raise UserError(f'{key}: found {" and ".join(weights)}; expected at most one of {", ".join(WEIGHTS)}')


def _check_stream_options(options: Mapping[str, Any], key: str) -> None:
    for name, (kind, least, expected) in NUMBERS.items():
        value = options.get(name, least)
        good = isinstance(value, kind) and not isinstance(value, bool) and least <= value < float('inf')
        if value is not None and not good:
            raise UserError(f'{key}.{name}: found {value!r}; expected {expected}')
    check_arguments(Stream, options, key)


def _check_mixture(streams: Mapping[str, Mapping[str, Any]], key: str) -> None:
    used = {
        name: next((weight for weight in WEIGHTS if stream.get(weight) is not None), 'no weight')
        for name, stream in streams.items()
    }
    relative = [name for name, weight in used.items() if weight == 'proportion']
    absolute = [name for name, weight in used.items() if weight != 'proportion']
    if relative and absolute:
        raise UserError(
            f'{key}: found proportion in {relative[0]} and {used[absolute[0]]} in {absolute[0]}; expected proportion '
            'in all of them or in none'
        )
    if streams and all(streams[name].get(weight) == 0 for name, weight in used.items()):
        raise UserError(f'{key}: found only weights of 0; expected one above')
