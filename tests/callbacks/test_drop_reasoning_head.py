"""The export at the fit's end leaves the run as it was, and a failed one leaves nothing."""

import json
import shutil
from pathlib import Path

import hub_server
import pytest
import torch
from composer import Callback, Trainer
from composer.loggers import FileLogger
from composer.models import HuggingFaceModel
from forks import run_ranks
from huggingface_hub import ModelCard
from tiny import LABELS, tiny_classifier, tiny_lm, tiny_tokenizer, triplets
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from dhrd_plugin import AuxiliaryReasoningLoss, DropReasoningHead, TripletCollator
from dhrd_plugin.data.data_spec import triplet_data_spec
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
    with pytest.raises(UserError, match=r'output_dir: .*/file/slim: .*/file is a file; expected a folder'):
        build(tiny_classifier(), DropReasoningHead(str(tmp_path / 'file' / 'slim'))).fit()
    assert [path.name for path in tmp_path.iterdir()] == ['file']


class Trained(Callback):
    """Whether a batch was trained."""

    yes = False

    def batch_start(self, state, logger):
        self.yes = True


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        ('docs', 'docs: holds mine, which is no part of an export'),
        ('docs/{run_name}', 'docs/mine: holds notes.txt, which is no part of an export'),
        ('ckpt', 'ckpt: is save_folder'),
        ('work', 'work: holds the log'),
        ('file', 'file: found a file; expected a folder'),
    ],
)
def test_in_any_pipeline_a_target_is_looked_at_before_training(tmp_path, target, message):
    for path in ('docs/thesis.tex', 'docs/mine/notes.txt', 'file'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('mine')
    trained = Trained()
    trainer = build(
        tiny_classifier(),
        DropReasoningHead(str(tmp_path / target)),
        trained,
        run_name='mine',
        save_folder=str(tmp_path / 'ckpt'),
        loggers=FileLogger(str(tmp_path / 'work' / 'log.txt'), capture_stdout=False, capture_stderr=False),
    )
    with pytest.raises(UserError, match=f'drop_reasoning_head.output_dir: {tmp_path}/{message}'):
        trainer.fit()
    assert not trained.yes
    assert [(tmp_path / path).read_text() for path in ('docs/thesis.tex', 'docs/mine/notes.txt', 'file')] == 3 * [
        'mine'
    ]


@pytest.mark.parametrize(
    ('targets', 'message'),
    [
        (['out/a', 'out'], 'out: holds output_dir of DropReasoningHead 1'),
        (['out', 'out/a'], 'out: holds output_dir of DropReasoningHead 2'),
        (['out', 'out'], 'out: is output_dir of DropReasoningHead 2'),
        (['out', 'out.best.pt'], 'out.best.pt: is the best weights of DropReasoningHead 1'),
    ],
)
def test_exporters_that_would_replace_each_others_files_are_refused_before_training(tmp_path, targets, message):
    trained = Trained()
    exporters = [DropReasoningHead(str(tmp_path / name), every='1ba') for name in targets]
    exporters[0].monitor = 'MulticlassAccuracy'
    with pytest.raises(UserError, match=f'drop_reasoning_head.output_dir: {tmp_path}/{message}'):
        build(tiny_classifier(), *exporters, trained).fit()
    assert not trained.yes and [*tmp_path.iterdir()] == []


def test_a_target_that_names_the_time_is_looked_at_when_it_is_written(tmp_path):
    (tmp_path / 'ba2').mkdir()
    (tmp_path / 'ba2' / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match=r'ba2: holds notes\.txt, which is no part of an export'):
        build(tiny_classifier(), DropReasoningHead(str(tmp_path / 'ba{batch}'))).fit()
    assert [path.name for path in (tmp_path / 'ba2').iterdir()] == ['notes.txt']
    assert [path.name for path in tmp_path.iterdir()] == ['ba2']


@pytest.mark.parametrize('step', ['save_torch_state_dict', 'replace_folder', '_write_model'])
def test_a_failing_write_leaves_the_older_export_intact(tmp_path, monkeypatch, step):
    out = tmp_path / 'slim'
    build(tiny_classifier(tiny_tokenizer(apart=True), head='linear'), DropReasoningHead(str(out))).fit()
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*args, **kwargs):
        raise OSError('No space left on device')

    monkeypatch.setattr(f'dhrd_plugin.export.write.{step}', full)
    with pytest.raises(UserError, match='No space left on device'):
        build(tiny_classifier(tiny_tokenizer(apart=True), head='linear', seed=1), DropReasoningHead(str(out))).fit()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ['slim']
    AutoModelForSequenceClassification.from_pretrained(out)


def test_an_unknown_dtype_or_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"drop_reasoning_head.dtype: found 'int4'"):
        DropReasoningHead(str(tmp_path), dtype='int4')
    model = HuggingFaceModel(tiny_lm(), tiny_tokenizer(), shift_labels=True)
    collator = TripletCollator(tiny_tokenizer(), LABELS)
    rows = DataLoader(
        triplets(8),
        4,
        collate_fn=lambda rows: (
            {key: value for key, value in collator(rows).items() if key in ('input_ids', 'attention_mask')}
            | {'labels': collator(rows)['input_ids']}
        ),
    )
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


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_exports_on_the_way_too(tmp_path):
    out = str(tmp_path / 'slim' / 'ba{batch}')
    trainer = build(tiny_classifier(tiny_tokenizer(apart=True), head='linear'), DropReasoningHead(out, every='1ba'))
    trainer.fit(duration='3ba')
    assert sorted(path.name for path in (tmp_path / 'slim').iterdir()) == ['ba1', 'ba2', 'ba3']
    weights = {files_of(path)['model.safetensors'] for path in (tmp_path / 'slim').iterdir()}
    assert len(weights) == 3
    with pytest.raises(UserError, match=r"drop_reasoning_head.every: found '2 epochs'"):
        DropReasoningHead(out, every='2 epochs')


def test_the_card_tells_metrics_data_and_yaml(tmp_path):
    model = tiny_classifier(head='linear')
    model.info |= {'config': 'alpha: 0.5\n', 'data': {'train_loader': 'abc123'}}
    trainer = build(model, DropReasoningHead(str(tmp_path / 'slim')))
    trainer.fit()
    card = (tmp_path / 'slim' / 'README.md').read_text()
    accuracy = float(trainer.state.eval_metrics['eval']['MulticlassAccuracy'].compute())
    assert f'| eval | MulticlassAccuracy | {accuracy:.4f} |' in card
    assert '- train_loader: `abc123`' in card and '```yaml\nalpha: 0.5\n```' in card
    assert ModelCard(card).data.pipeline_tag == 'text-classification'


def test_the_card_tells_no_metrics_of_other_weights(tmp_path):
    """Composer evaluates after 2 batches, and after the fit's end, which is at 3."""
    trainer = build(tiny_classifier(), DropReasoningHead(str(tmp_path / '{batch}'), every='1ba'))
    trainer.fit(duration='3ba')
    found = {path.name: '## Evaluation' in (path / 'README.md').read_text() for path in tmp_path.iterdir()}
    assert found == {'1': False, '2': True, '3': False}


def test_the_export_is_uploaded(tmp_path, s3, uploads):
    remote = f'{s3.bucket}/exports/{{run_name}}/ba{{batch}}'
    callback = DropReasoningHead(str(tmp_path / 'slim'), remote=remote)
    trainer = build(tiny_classifier(), callback, run_name='first')
    trainer.fit()
    trainer.close()
    assert files_of(s3.folder / 'exports' / 'first' / 'ba2') == files_of(tmp_path / 'slim')


def export_twice(tmp_path, **where):
    """To the same place, the second time something else and without an ONNX file."""
    pytest.importorskip('onnx')
    for seed in range(2):
        callback = DropReasoningHead(str(tmp_path / 'slim'), onnx=not seed, **where)
        trainer = build(tiny_classifier(seed=seed), callback)
        trainer.fit()
        trainer.close()


def test_the_object_store_holds_the_last_export_and_what_is_not_of_one(tmp_path, s3, uploads):
    s3.put('twice/slim/notes.txt', b'mine')
    s3.put('twice/slim/model-00001-of-00002.safetensors', b'of a larger one')
    s3.put('twice/slimmer/model.onnx', b'of another')
    export_twice(tmp_path, remote=f'{s3.bucket}/twice/slim')
    assert files_of(s3.folder / 'twice' / 'slim') == {**files_of(tmp_path / 'slim'), 'notes.txt': b'mine'}
    assert (s3.folder / 'twice' / 'slimmer' / 'model.onnx').is_file()


def test_what_cannot_be_removed_from_the_object_store_is_told(tmp_path, s3, uploads, monkeypatch, caplog):
    """With a key that may write, and neither list nor delete."""

    def denied(self, prefix):
        raise PermissionError('AccessDenied')

    monkeypatch.setattr('composer.utils.S3ObjectStore.list_objects', denied)
    callback = DropReasoningHead(str(tmp_path / 'slim'), remote=f'{s3.bucket}/denied')
    trainer = build(tiny_classifier(), callback)
    trainer.fit()
    trainer.close()
    assert files_of(s3.folder / 'denied') == files_of(tmp_path / 'slim')
    assert 'bucket/denied: what an earlier export left there: stays beside the export: PermissionError' in caplog.text


@pytest.mark.parametrize('remote', ['s3://absent/slim', 'slim'])
def test_a_remote_that_refuses_is_told_before_training(tmp_path, s3, remote):
    with pytest.raises(UserError, match=f'drop_reasoning_head.remote: .*{remote}'):
        build(tiny_classifier(), DropReasoningHead(str(tmp_path / 'slim'), remote=remote)).fit()
    assert not (tmp_path / 'slim').exists()


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hugging Face hub, and the token that it takes."""
    server = hub_server.serve()
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', server.address)
    monkeypatch.setenv('HF_TOKEN', 'hf_good')
    yield server
    server.shutdown()


def test_the_export_is_pushed_to_the_hub(tmp_path, hub):
    build(tiny_classifier(), DropReasoningHead(str(tmp_path / 'slim'), push_to_hub='org/rte', private=True)).fit()
    assert hub.repos == {'org/rte': files_of(tmp_path / 'slim')}
    assert hub.private == {'org/rte': True} and 'batch 2' in hub.messages[0]
    assert not any(b'hf_good' in content for content in files_of(tmp_path / 'slim').values())


def test_the_hub_holds_the_last_export_and_what_is_not_of_one(tmp_path, hub):
    hub.repos['org/rte'] = {'LICENSE': b'mine', '.gitattributes': b'*'}
    export_twice(tmp_path, push_to_hub='org/rte')
    assert hub.repos['org/rte'] == {**files_of(tmp_path / 'slim'), 'LICENSE': b'mine', '.gitattributes': b'*'}
    assert len(hub.messages) == 2


def test_a_hub_that_refuses_is_told_before_training(tmp_path, hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_bad')
    with pytest.raises(UserError, match=r'drop_reasoning_head.push_to_hub: org/rte: cannot be written: .*401') as error:
        build(tiny_classifier(), DropReasoningHead(str(tmp_path / 'slim'), push_to_hub='org/rte')).fit()
    assert 'hf_bad' not in str(error.value) and not (tmp_path / 'slim').exists()


def test_on_two_ranks_a_failure_of_rank_0_ends_both_and_a_slow_one_neither(tmp_path):
    """The slow export takes longer than a collective may wait."""
    run_ranks(2, Path(__file__).parents[1] / 'exports.py', tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f'rank{rank}.json').read_text())
        assert found == {
            'full': f'UserError: {tmp_path}/slim/model.safetensors: No space left on device',
            'broken': "RuntimeError: rank 0 failed: KeyError: 'weight'",
            'slow': 'done',
            'gathered': [0, 10],
        }


def test_a_full_disk_is_told_and_leaves_the_older_export(tmp_path, tmpfs):
    small_disk = tmpfs(tmp_path / 'disk', '200k')
    out = small_disk / 'slim'
    build(tiny_classifier(tiny_tokenizer(apart=True), head='linear'), DropReasoningHead(str(out))).fit()
    before = files_of(out)
    (small_disk / 'other').write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    with pytest.raises(UserError, match='No space left on device'):
        build(tiny_classifier(tiny_tokenizer(apart=True), head='linear', seed=1), DropReasoningHead(str(out))).fit()
    assert files_of(out) == before and sorted(path.name for path in small_disk.iterdir()) == ['other', 'slim']
