"""Where an export may stand: in a new or empty folder, or in the place of an earlier one, with nothing beside it."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import transformers

from dhrd_plugin import models
from dhrd_plugin.export.card import DROPPED
from dhrd_plugin.files import check_folder, read_object

_WEIGHTS = re.compile(
    r'(model|pytorch_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|model(-int8)?\.onnx(\.data)?'
)
_TEMPLATES = 'additional_chat_templates'  # a folder, where there are several
_PLAIN = {
    'README.md',
    'config.json',
    'generation_config.json',
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'chat_template.jinja',
    'chat_template.json',
    _TEMPLATES,
}


def check_place(out: str | Path, key: str = '', apart: Mapping[str, str | Path | None] | None = None) -> None:
    """Refuse a place that an export may not replace, or that cannot be written; see ``files.check_folder``.

    Args:
        out: of the export.
        key: what names it, for messages. Default: nothing.
        apart: what it must neither be nor hold, by name. Default: only the current folder.
    """
    check_folder(out, key, 'an export', foreign, apart)


def foreign(folder: Path) -> str | None:
    """The name of something in a folder that is no part of an export; ``None`` where all of it is one export."""
    belongs = _belongs(folder)
    for path in sorted(folder.iterdir()):
        if not belongs(path.name):
            return path.name
        inside = {file.suffix for file in path.iterdir()} if path.is_dir() else set()
        if path.is_dir() != (path.name == _TEMPLATES) or inside - {'.jinja'}:
            return path.name
    return None if _is_ours(folder) else 'a model of other making'


def left_over(names: Iterable[str], folder: Path) -> list[str]:
    """Of what lies where an export is put, the files of an earlier one that this one has not: loaders would take them.

    Args:
        names: of all files there.
        folder: of the export.
    """
    belongs = _belongs(folder)
    return [name for name in names if belongs(name) and not (folder / name).exists()]


def _belongs(folder: Path) -> Callable[[str], bool]:
    """Whether an export with the tokenizer of this one may have a file of that name."""
    own = _PLAIN | _tokenizer_files(folder)
    code = Path(models.__file__).parent  # modules of it travel with an export
    return lambda name: bool(
        name in own or _WEIGHTS.fullmatch(name) or (name.endswith('.py') and (code / name).is_file())
    )


def _is_ours(folder: Path) -> bool:
    """By the model card, or by the config: a stock classifier's has none of our keys."""
    card = folder / 'README.md'
    return 'dhrd' in read_object(folder / 'config.json') or (
        card.is_file() and DROPPED in card.read_text('utf-8', errors='replace')
    )


def _tokenizer_files(folder: Path) -> set[str]:
    """What the tokenizer of an export may have written, by the names in its class."""
    name = str(read_object(folder / 'tokenizer_config.json').get('tokenizer_class')).removesuffix('Fast')
    found: set[str] = set()
    for kind in (name, f'{name}Fast'):
        with suppress(AttributeError, ImportError):  # no such class, or one whose package is not installed
            found |= set(getattr(transformers, kind).vocab_files_names.values())
    return found
