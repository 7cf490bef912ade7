"""The export at the fit's end leaves the run as it was, and a failed one leaves nothing."""

import pytest
import torch
from composer import Callback, Trainer
from composer.models import HuggingFaceModel
from tiny import LABELS, tiny_classifier, tiny_lm, tiny_tokenizer, triplets
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from dhrd_plugin import AuxiliaryReasoningLoss, DropReasoningHead, TripletCollator
from dhrd_plugin.data.collation import triplet_data_spec
from dhrd_plugin.errors import UserError

pytestmark = pytest.mark.usefixtures('one_thread')


class Weights(Callback):
    """Copies of the weights as they are before and after the export."""

    def __init__(self):
        self.before = self.after = {}

    def batch_end(self, state, logger):
        self.before = {name: value.clone() for name, value in state.model.state_dict().items()}

    def fit_end(self, state, logger):
        self.after = {name: value.clone() for name, value in state.model.state_dict().items()}


def build(model, *callbacks, **options):
    """A trainer of two steps that evaluates at its end."""
    collator = TripletCollator(tiny_tokenizer(), LABELS)
    train, val = (triplet_data_spec(DataLoader(triplets(count), 4, collate_fn=collator)) for count in (8, 7))
    return Trainer(
        model=model,
        train_dataloader=train,
        eval_dataloader=val,
        eval_interval='2ba',
        optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01),
        max_duration='2ba',
        device='cpu',
        algorithms=[AuxiliaryReasoningLoss()],
        callbacks=list(callbacks),
        progress_bar=False,
        **options,
    )


@pytest.mark.parametrize('options', [{'tied': True}, {'lora': True, 'head': 'linear'}], ids=['tied', 'lora'])
def test_the_live_model_trains_on_evaluates_and_saves(tmp_path, options):
    model, weights = tiny_classifier(**options), Weights()
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer = build(model, DropReasoningHead(str(tmp_path / 'slim')), weights, save_folder=str(tmp_path / 'ckpt'))
    trainer.fit()
    assert weights.before.keys() == weights.after.keys()
    assert all(torch.equal(weights.before[name], value) for name, value in weights.after.items())
    assert requires == {name: p.requires_grad for name, p in model.named_parameters()} and model.training

    first = (tmp_path / 'slim' / 'model.safetensors').read_bytes()
    trainer.eval()
    assert 0 <= float(trainer.state.eval_metrics['eval']['MulticlassAccuracy'].compute()) <= 1
    trainer.fit(duration='2ba')
    trainer.save_checkpoint(str(tmp_path / 'again.pt'))
    assert trainer.state.timestamp.batch == 4 and (tmp_path / 'again.pt').is_file()
    # The second fit's export takes the place of the first.
    assert (tmp_path / 'slim' / 'model.safetensors').read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ['again.pt', 'ckpt', 'slim']


def test_the_export_changes_no_later_step(tmp_path):
    runs = []
    for callbacks in ([], [DropReasoningHead(str(tmp_path / 'slim'))]):
        trainer = build(tiny_classifier(), *callbacks)
        trainer.fit()
        trainer.fit(duration='2ba')
        runs.append(trainer.state.model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_failing_write_ends_the_run_and_leaves_nothing(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(RuntimeError, match=r'rank 0 failed: .*Error'):
        build(tiny_classifier(), DropReasoningHead(str(tmp_path / 'file' / 'slim'))).fit()
    assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('step', ['save_torch_state_dict', 'replace_folder', '_write_tokenizer'])
def test_a_failing_write_leaves_the_older_export_intact(tmp_path, monkeypatch, step):
    out = tmp_path / 'slim'
    build(tiny_classifier(head='linear'), DropReasoningHead(str(out))).fit()
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*args, **kwargs):
        raise OSError('No space left on device')

    monkeypatch.setattr(f'dhrd_plugin.models.export.{step}', full)
    with pytest.raises(RuntimeError, match='rank 0 failed: OSError: No space left on device'):
        build(tiny_classifier(head='linear', seed=1), DropReasoningHead(str(out))).fit()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ['slim']
    AutoModelForSequenceClassification.from_pretrained(out)


def test_an_unknown_dtype_or_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"drop_reasoning_head.dtype: found 'int4'"):
        DropReasoningHead(str(tmp_path), dtype='int4')
    model = HuggingFaceModel(tiny_lm(), tiny_tokenizer(), shift_labels=True)
    collator = TripletCollator(tiny_tokenizer(), LABELS)
    rows = DataLoader(triplets(8), 4, collate_fn=lambda rows: {
        key: value for key, value in collator(rows).items() if key in ('input_ids', 'attention_mask')
    } | {'labels': collator(rows)['input_ids']})  # fmt: skip
    trainer = Trainer(
        model=model,
        train_dataloader=rows,
        max_duration='1ba',
        device='cpu',
        callbacks=[DropReasoningHead(str(tmp_path / 'slim'))],
        progress_bar=False,
    )
    with pytest.raises(UserError, match='found a model of type HuggingFaceModel'):
        trainer.fit()
