"""What is done to a model folder before a verb is shown it, and a pickle that tells whether it was run."""

import json

from safetensors.torch import load_file, save_file

WEIGHTS = 'model.safetensors'
# Of a folder with code of its own, which makes a file where it is loaded.
CODE = """
from pathlib import Path
Path('{proof}').touch()
from transformers import LlamaConfig, {model}, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = '{kind}'
class Model({model}):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


class Hostile:
    """Whose pickle makes a file where it is loaded."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), 'w')


def change_json(path, **values):
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit(name, **values):
    """The damage that sets keys of a JSON file of a folder."""
    return lambda folder: change_json(folder / name, **values)


def cut(name, length=20):
    """The damage that leaves so many bytes of a file of a folder."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def weights(change):
    """The damage that calls ``change`` on the weights of a folder, by name."""

    def damage(folder):
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={'format': 'pt'})

    return damage
