"""What tests of more than one verb need."""

from pathlib import Path

import pytest
from tiny import tiny_lm, tiny_tokenizer


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A tiny random model with its tokenizer."""
    folder = tmp_path / 'model'
    tiny_lm('llama', tied=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
