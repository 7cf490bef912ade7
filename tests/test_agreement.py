"""One run's classifier, whoever asks it: the same labels and probabilities on the same rows."""

import json
from typing import Any

import pytest
import torch
from parallel_runs import config_of, write_inputs
from tiny import triplet
from transformers import AutoTokenizer, pipeline

from dhrd_plugin import train
from dhrd_plugin.cli import main

pytestmark = pytest.mark.usefixtures('one_thread')
COUNT = 200


@pytest.fixture(scope='module', params=['tied-lora', 'untied-lora'])
def trained(request, tmp_path_factory):
    """The folder of a run, the accuracy of its last evaluation, and the live model's [N, K] probabilities."""
    pytest.importorskip('onnx_ir')
    root = tmp_path_factory.mktemp('agreement')
    write_inputs(root)
    (root / 'val.jsonl').write_text('\n'.join(json.dumps(triplet(i, 2 + i % 7, None)) for i in range(COUNT)))
    export = f'callbacks.drop_reasoning_head={{output_dir: {root}/slim, onnx: int8}}'
    trainer = train(config_of(root, 'one', request.param, export))
    live = trainer.state.model.eval()
    with torch.inference_mode():
        logits = torch.cat([live.eval_forward(batch) for batch in trainer.state.evaluators[0].dataloader.dataloader])
    accuracy = float(trainer.state.eval_metrics['val']['MulticlassAccuracy'].compute())
    trainer.close()
    return root, accuracy, logits.softmax(-1)


def rows_of(root):
    return [json.loads(line) for line in (root / 'val.jsonl').read_text().splitlines()]


def names_of(root):
    found = json.loads((root / 'slim' / 'config.json').read_text())['id2label']
    return [found[str(index)] for index in range(len(found))]


def by_evaluate(root):
    words = [str(root / 'slim'), str(root / 'val.jsonl'), '--output', str(root / 'report'), '--runtime', 'torch']
    assert main(['evaluate', *words]) == 0
    return [json.loads(line) for line in (root / 'report' / 'predictions.jsonl').read_text().splitlines()]


def by_predict(root):
    out = root / 'out.jsonl'
    words = ['--input', str(root / 'val.jsonl'), '--output', str(out), '--runtime', 'torch']
    assert main(['predict', str(root / 'slim'), *words]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def by_pipeline(root):
    classify = pipeline('text-classification', model=str(root / 'slim'), trust_remote_code=True, device='cpu')
    texts = [row['input_text'] for row in rows_of(root)]
    answers: Any = classify(texts, top_k=None, batch_size=7)
    found = [{answer['label']: answer['score'] for answer in scores} for scores in answers]
    return [{'id': row['id'], 'probabilities': scores} for row, scores in zip(rows_of(root), found, strict=True)]


def by_onnxruntime(root, name='model.onnx'):
    """The file alone, as a server without this package would run it."""
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(root / 'slim' / name, providers=['CPUExecutionProvider'])
    tokenizer, rows = AutoTokenizer.from_pretrained(root / 'slim'), rows_of(root)
    batch = tokenizer([row['input_text'] for row in rows], padding=True, return_tensors='np')
    inputs = {key: batch[key] for key in ('input_ids', 'attention_mask')}
    found = torch.tensor(session.run(None, inputs)[0]).softmax(-1).tolist()
    return [{'id': row['id'], 'probabilities': dict(zip(names_of(root), values))} for row, values in zip(rows, found)]


def by_int8(root):
    return by_onnxruntime(root, 'model-int8.onnx')


# How far a probability may be from the live model's: predict rounds to four digits; int8 has its own test.
WAYS = {by_evaluate: 1e-5, by_predict: 6e-5, by_pipeline: 1e-5, by_onnxruntime: 1e-5, by_int8: None}


@pytest.mark.parametrize('way', WAYS)
def test_all_agree_with_the_run(trained, way):
    """int8 may be wrong in one row of a hundred more, or right."""
    root, accuracy, expected = trained
    answers, names = way(root), names_of(root)
    assert [row['id'] for row in answers] == [row['id'] for row in rows_of(root)]
    found = torch.tensor([[row['probabilities'][name] for name in names] for row in answers])
    labels = torch.tensor([names.index(row['label']) for row in rows_of(root)])
    right = int((found.argmax(-1) == labels).sum())
    assert len(found.argmax(-1).unique()) == len(names)
    if WAYS[way] is None:
        assert abs(right - round(accuracy * COUNT)) <= COUNT / 100 and not torch.equal(found, expected)
    else:
        assert right / COUNT == pytest.approx(accuracy)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(found, expected, atol=WAYS[way], rtol=0)
