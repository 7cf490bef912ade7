"""The tokenizer of a model's metadata, for its export; Composer stores the files of one in a checkpoint."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dhrd_plugin.errors import UserError, one_line, user_errors
from dhrd_plugin.models.versions import tokenizer_class

_FILE = re.compile(r'[\w.+ -]+\.(json|txt|model|jinja|py)')  # those that Composer stores
# Of a tokenizer.json: a sharded checkpoint loses what is empty, and without these it cannot be read.
_NEEDED = {'TemplateProcessing': {'single': [], 'pair': [], 'special_tokens': {}}, 'BPE': {'vocab': {}, 'merges': []}}


@contextmanager
def restored_tokenizer(
    files: Mapping[str, Any] | None, pad_token_id: int | None, max_seq_len: int | None
) -> Iterator[Any]:
    """The tokenizer of a model's metadata as an export has it; ``None`` where there is none."""
    if not files:
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:  # some tokenizers copy their files from here when they are saved
        with user_errors('tokenizer: cannot be restored from the metadata'):
            tokenizer = _restore(files, Path(scratch))
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
            tokenizer.padding_side = 'right'
            if isinstance(max_seq_len, int):
                tokenizer.model_max_length = max_seq_len
        yield tokenizer


def _restore(files: Mapping[str, Mapping[str, Any]], folder: Path) -> Any:
    """The tokenizer, from the files that a ``HuggingFaceModel`` put into its metadata; code among them is left out."""
    for name, file in files.items():
        # A checkpoint of an older Composer has the names without their suffixes.
        name = name if name.endswith(file['file_extension']) else name + file['file_extension']
        if not _FILE.fullmatch(name):
            raise UserError(
                f'tokenizer: found a file named {one_line(name)!r}; expected a plain name such as vocab.txt'
            )
        if not name.endswith('.py'):
            (folder / name).write_bytes(_content(name, file['content']))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _content(name: str, content: Any) -> bytes:
    if name == 'tokenizer.json':
        content = {'added_tokens': [], **_with_empty(content)}
    if name == 'tokenizer_config.json':
        content = {**content, 'tokenizer_class': tokenizer_class(content.get('tokenizer_class'))}
    if name.endswith('.json'):
        content = json.dumps(content)
    elif name.endswith('.txt'):  # its lines
        content = ''.join(f'{line}\n' for line in content)
    return content.encode() if isinstance(content, str) else content


def _with_empty(content: Any) -> Any:
    """The content of a ``tokenizer.json`` with the empty lists and mappings that a sharded checkpoint has lost."""
    if isinstance(content, list):
        return [_with_empty(value) for value in content]
    if not isinstance(content, Mapping):
        return content
    if dict(content) == {'type': 'Sequence'}:  # of nothing
        return None
    kind = content.get('type')
    needed = _NEEDED.get(kind, {}) if isinstance(kind, str) else {}
    return {**needed, **{key: _with_empty(value) for key, value in content.items()}}
