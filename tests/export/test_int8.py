"""The int8 ONNX file beside the fp32 one."""

import re

import pytest
import torch
from composer import Evaluator, Trainer
from test_write import ROWS
from tiny import LABELS, tiny_classifier, tiny_tokenizer, triplets
from torch.utils.data import DataLoader

from dhrd_plugin import AuxiliaryReasoningLoss, DropReasoningHead, TripletCollator, load_classifier
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.errors import UserError
from dhrd_plugin.export import from_checkpoint
from dhrd_plugin.export.place import foreign
from dhrd_plugin.export.write import add_onnx, network_state, write_slim

pytestmark = pytest.mark.usefixtures('one_thread')
TEXTS = [row['input_text'] for row in ROWS]


@pytest.fixture
def int8_written():
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx_ir')


@pytest.mark.usefixtures('int8_written')
@pytest.mark.parametrize('head', ['linear', 'mlp'])
def test_int8_answers_nearly_as_fp32_and_its_card_says_how(tmp_path, head):
    model = tiny_classifier(tiny_tokenizer(bos=True, apart=True), head=head)
    out = write_slim(model.get_metadata(), network_state(model.state_dict()), tmp_path / 'slim', onnx='int8')
    add_onnx(out, 'int8')  # again: in its own place
    assert sorted(path.name for path in out.glob('*.onnx')) == ['model-int8.onnx', 'model.onnx']
    assert foreign(out) is None
    card = (out / 'README.md').read_text()
    assert card.count('## int8') == 1 and 'of the labels are the same' in card
    plain, int8 = load_classifier(out, 'onnx'), load_classifier(out / 'model-int8.onnx')
    assert (plain.runs_on, int8.runs_on) == ('onnxruntime, 1 thread', 'onnxruntime, 1 thread, int8')
    first, second = plain.predict_proba(TEXTS), int8.predict_proba(TEXTS)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, atol=0.1, rtol=0)
    (out / 'model.onnx').unlink()
    assert load_classifier(out, 'onnx').runs_on == int8.runs_on  # the only one


@pytest.mark.usefixtures('int8_written')
@pytest.mark.parametrize(
    'words, names',
    [
        (['CK', 'OUT'], []),
        (['CK', 'OUT', '--onnx'], ['model.onnx']),
        (['--onnx', 'CK', 'OUT'], ['model.onnx']),
        (['--onnx', 'fp32', 'CK', 'OUT'], ['model.onnx']),
        (['CK', 'OUT', '--onnx', 'int8'], ['model-int8.onnx', 'model.onnx']),
        (['--onnx=int8', 'CK', 'OUT'], ['model-int8.onnx', 'model.onnx']),
    ],
)
def test_the_command_takes_the_kind_or_none(tmp_path, words, names):
    model = tiny_classifier(tiny_tokenizer())
    state = {'model': model.state_dict(), 'integrations': {'huggingface': model.get_metadata()}}
    torch.save({'state': state}, tmp_path / 'ck.pt')
    places = {'CK': str(tmp_path / 'ck.pt'), 'OUT': str(tmp_path / 'slim')}
    assert from_checkpoint.main([str(places.get(word, word)) for word in words]) == 0
    assert sorted(path.name for path in (tmp_path / 'slim').glob('*.onnx')) == names


def test_another_kind_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"^drop_reasoning_head.onnx: found 'int4'; expected true \(fp32\), 'fp32' or"):
        DropReasoningHead('slim', onnx='int4')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'onnx_ir' else name)
    assert DropReasoningHead('slim', onnx=True).onnx == 'fp32'
    with pytest.raises(UserError, match=r'^drop_reasoning_head.onnx: the package onnx_ir is not installed'):
        DropReasoningHead('slim', onnx='int8')


@pytest.mark.usefixtures('int8_written')
def test_a_run_compares_them_on_rows_that_it_evaluated(tmp_path):
    tokenizer = tiny_tokenizer(bos=True, apart=True)
    model = tiny_classifier(tokenizer, head='mlp')
    collate = TripletCollator(tokenizer, LABELS)  # its batches hold reasoning, which is no input
    train = DataLoader(triplets(8), 4, collate_fn=collate)  # pyright: ignore[reportArgumentType]
    held_out = DataLoader(triplets(12), 5, collate_fn=collate)  # pyright: ignore[reportArgumentType]
    trainer = Trainer(
        model=model,
        train_dataloader=triplet_data_spec(train),
        eval_dataloader=Evaluator(
            label='validation', dataloader=triplet_data_spec(held_out), metric_names=['MulticlassAccuracy']
        ),
        max_duration='2ba',
        eval_interval='1ba',
        device='cpu',
        algorithms=[AuxiliaryReasoningLoss()],
        callbacks=[DropReasoningHead(str(tmp_path / 'slim'), onnx='int8')],
        progress_bar=False,
    )
    trainer.fit()
    card = (tmp_path / 'slim' / 'README.md').read_text()
    (fp32,) = re.findall(r'on 12 rows of validation: .* Accuracy on them: \S+ in int8, (\S+) in fp32\.', card)
    expected = trainer.state.eval_metrics['validation']['MulticlassAccuracy'].compute()
    assert float(fp32) == pytest.approx(float(expected), abs=1e-4)
