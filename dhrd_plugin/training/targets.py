"""Every place that a run writes is looked at before it reads anything: whether it may be written, and can be."""

import dataclasses
from pathlib import Path
from typing import Any

from composer.core import Timestamp
from composer.utils import format_name_with_dist_and_time

from dhrd_plugin import files
from dhrd_plugin.data.rows import find_source
from dhrd_plugin.export.place import check_place
from dhrd_plugin.models.pretrained import PACKAGE_PREFIX
from dhrd_plugin.streams.remote import check_address, is_remote
from dhrd_plugin.streams.settings import named_streams
from dhrd_plugin.training.builders import save_folder
from dhrd_plugin.training.config import Config, loaders, used
from dhrd_plugin.training.summary import SUMMARY, log_file

EXPORT = 'callbacks.drop_reasoning_head.output_dir'
REMOTE = 'callbacks.drop_reasoning_head.remote'
_LOG = (b'[stdout]: ', b'[stderr]: ', b'[trace]: ', b'[table]: ', b'[metric][', b'[hyperparameter]: ')


def check_targets(config: Config) -> None:
    """Refuse a run that would write onto an input, onto what is not its own, or where it cannot.

    Names that tell the time are looked at as they are at the start; the export looks again when it is written.

    Args:
        config: of :func:`~dhrd_plugin.load_config`.

    Raises:
        UserError: names the key, the path and what is wrong with it.
    """
    folder, log, read = save_folder(config), log_file(config), inputs(config)
    export = used(config.callbacks).get('drop_reasoning_head')
    addresses = {'save_folder': folder, 'load_path': config.load_path, REMOTE: export and export.get('remote')}
    for key, place in addresses.items():
        if place is not None:
            check_address(place, key)  # Composer reads a local path as an address, too
    written = {'output_dir': config.output_dir}
    if folder is not None and not is_remote(folder):
        written['save_folder'] = folder
    for key, place in written.items():
        files.check_into(place, key)
    summary = Path(config.output_dir) / SUMMARY
    files.check_file(summary, 'output_dir', 'a summary', lambda path: files.has_keys(path, 'run_name', 'config'), read)
    written['the summary'] = str(summary)
    if log is not None:
        key = 'loggers.file.filename'
        files.check_file(log, key, 'a log', lambda path: files.begins_with(path, *_LOG), read)
        written[key] = str(log)
    if export is not None:
        name = format_name_with_dist_and_time(str(export['output_dir']), config.run_name, Timestamp())
        check_place(name, EXPORT, {**read, **written, **_caches(config)})


def inputs(config: Config) -> dict[str, str]:
    """The files and folders on this machine that a run reads, by their keys."""
    found: dict[str, Any] = {}
    for key, loader in loaders(config).items():
        found[f'{key}.source'] = loader.source and find_source(loader.source)
        found[f'{key}.rationales'] = loader.rationales and find_source(loader.rationales)
        for name, stream in named_streams(dataclasses.asdict(loader), key).items():
            found |= {f'{name}.{place}': stream.get(place) for place in ('local', 'remote')}
    model = config.model.pretrained_model_name_or_path
    found['model.pretrained_model_name_or_path'] = None if model.startswith(PACKAGE_PREFIX) else model
    found |= {'tokenizer.name': config.tokenizer.name, 'load_path': config.load_path, 'task': config.task}
    return {
        key: str(Path(place).expanduser())
        for key, place in found.items()
        if isinstance(place, str) and not is_remote(place) and Path(place).expanduser().exists()
    }


def _caches(config: Config) -> dict[str, str | Path]:
    given = {f'{key}.cache_dir': loader.cache_dir for key, loader in loaders(config).items() if loader.cache_dir}
    return {'the cache': files.cache_dir(), **{key: Path(folder).expanduser() for key, folder in given.items()}}
