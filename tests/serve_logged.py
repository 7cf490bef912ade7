"""Loads a logged model where dhrd_plugin cannot be imported; ``serve_logged.py URI TEXT ...`` prints its rows."""

import json
import sys


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('dhrd_plugin', 'composer'):
            raise ModuleNotFoundError(f'{name} is not to be had here')


sys.meta_path.insert(0, Block())

import mlflow  # noqa: E402

uri, *texts = sys.argv[1:]
for row in mlflow.pyfunc.load_model(uri).predict(texts).to_dict('records'):
    print(json.dumps(row))
