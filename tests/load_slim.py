"""Loads exported classifiers where dhrd_plugin cannot be imported; writes what they say as plain tensors.

Arguments: the folder that holds inputs.pt and, for each export, a sub-folder.
"""

import sys


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('dhrd_plugin', 'composer'):
            raise ModuleNotFoundError(f'{name} is not to be had here')


sys.meta_path.insert(0, Block())

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline  # noqa: E402

root = Path(sys.argv[1])
inputs = torch.load(root / 'inputs.pt', weights_only=True)
found = {}
for folder in sorted(path.parent for path in root.glob('*/slim/config.json')):
    trust = (folder / 'slim.py').exists()
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=trust, output_loading_info=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = inputs['labels'][folder.parent.name] if isinstance(inputs['labels'], dict) else inputs['labels']
    batch = tokenizer(inputs['texts'], padding=True, return_tensors='pt')
    left = tokenizer(inputs['texts'], padding=True, padding_side='left', return_tensors='pt')
    classify = pipeline('text-classification', model=str(folder), trust_remote_code=trust, device='cpu')
    model.eval()
    with torch.no_grad():
        found[folder.parent.name] = {
            'class': type(model).__name__,
            'info': {key: list(value) for key, value in info.items()},
            'logits': model(**batch).logits,
            'left': model(**left).logits,
            'loss': model(**batch, labels=labels).loss,
            'pipeline': classify(inputs['texts'], top_k=None, batch_size=3),
            'id2label': model.config.id2label,
            'label2id': model.config.label2id,
            'pad': [model.config.pad_token_id, tokenizer.pad_token_id],
            'padding_side': tokenizer.padding_side,
            'ids': tokenizer(inputs['texts'])['input_ids'],
        }
torch.save(found, root / 'found.pt')
