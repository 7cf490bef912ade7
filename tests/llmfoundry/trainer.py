"""llm-foundry's scripts/train/train.py, then the live model's logits: ``composer trainer.py YAML OUT [key=value ...]``.

OUT receives inputs.pt, as tests/load_slim.py reads it, and live.pt.
"""

import sys
from pathlib import Path

import torch
from llmfoundry.command_utils import train_from_yaml

yaml, out, *overrides = sys.argv[1:]
trainer = train_from_yaml(yaml, overrides)

loader = trainer.state.evaluators[0].dataloader.dataloader
model = trainer.state.model.eval()
with torch.inference_mode():
    logits = torch.cat([model.eval_forward(batch) for batch in loader])
rows = [loader.dataset[index] for index in range(len(loader.dataset))]
labels = torch.cat([batch['labels'] for batch in loader])
torch.save({'texts': [row['input_text'] for row in rows], 'labels': labels}, Path(out) / 'inputs.pt')
torch.save(logits, Path(out) / 'live.pt')
