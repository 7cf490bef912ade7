"""The export of the best evaluation, and one whose probabilities are calibrated."""

import json
import re
from pathlib import Path

import pytest
import torch
from composer.algorithms import EMA, SWA
from composer.callbacks import EarlyStopper
from composer.core import Event
from configs import TASK
from forks import run_ranks
from parallel_runs import config_of, write_inputs
from safetensors.torch import load_file
from stock import collator, fit, stock_classifier, tokenised
from test_drop_reasoning_head import build
from tiny import LABELS, tiny_classifier, tiny_tokenizer, triplets
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix, MulticlassF1Score
from transformers import AutoModelForSequenceClassification

from dhrd_plugin import AuxiliaryReasoningLoss, DropReasoningHead, TripletCollator, load_classifier, train
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import describe, report_on
from dhrd_plugin.export.best import is_better

pytestmark = pytest.mark.usefixtures('one_thread')
ACCURACY = 'MulticlassAccuracy'


def best(out, **options):
    return DropReasoningHead(str(out), monitor=ACCURACY, mode='max', dataloader_label='eval', **options)


def classifier(**options):
    model = tiny_classifier(**{'head': 'linear', **options})
    model.info['task'] = load_task(TASK).to_dict()
    return model


def falling(state):
    """The rate's factor: the training learns, and from the sixth step on climbs the loss again."""
    return 1.0 if state.timestamp.batch < 6 else -3.0


class Series(EarlyStopper):
    """Every evaluation's accuracy; a stopper that is too patient to stop."""

    def __init__(self, patience=99):
        super().__init__(ACCURACY, 'eval', patience=patience)
        self.found = {}

    def eval_end(self, state, logger):
        super().eval_end(state, logger)
        self.found[int(state.timestamp.batch)] = float(state.eval_metrics['eval'][ACCURACY].compute())


def card_of(folder):
    return (folder / 'README.md').read_text()


def rows_file(tmp_path):
    (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(row) for row in triplets(7)))
    return tmp_path / 'rows.jsonl'


@pytest.mark.parametrize('patience', [99, 2], ids=['to the end', 'stopped early'])
@pytest.mark.parametrize('options', [{}, {'head': 'mlp', 'lora': True}], ids=['stock', 'slim-lora'])
def test_the_best_evaluation_is_exported_and_the_card_tells_its_figures(tmp_path, options, patience):
    series = Series(patience)
    trainer = build(classifier(**options), best(tmp_path / 'slim'), series, schedulers=falling)
    trainer.fit(duration='16ba')
    chosen = max(series.found, key=series.found.__getitem__)
    assert chosen < max(series.found) and series.found[chosen] > series.found[max(series.found)]
    card, value = card_of(tmp_path / 'slim'), series.found[chosen]
    assert f'after batch {chosen} ' in card and f'| eval | {ACCURACY} | {value:.4f} |' in card
    facts = json.loads((tmp_path / 'slim' / 'config.json').read_text())['dhrd']['best']
    assert (facts['batch'], facts['metric'], facts['value']) == (chosen, ACCURACY, value)
    report = report_on(tmp_path / 'slim', [rows_file(tmp_path)])
    assert report['metrics']['accuracy'] == pytest.approx(value)
    assert [path.name for path in tmp_path.iterdir() if 'best' in path.name] == []


def test_the_exported_weights_are_those_of_that_batch(tmp_path):
    """``every`` without ``monitor`` has written those of each batch."""
    each = DropReasoningHead(str(tmp_path / 'ba{batch}'), every='2ba')
    series = Series()
    build(classifier(), each, best(tmp_path / 'slim'), series, schedulers=falling).fit(duration='10ba')
    chosen = max(series.found, key=series.found.__getitem__)
    expected, found = (load_file(tmp_path / name / 'model.safetensors') for name in (f'ba{chosen}', 'slim'))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize('algorithms', [[], [EMA(half_life='2ba')]], ids=['plain', 'ema'])
def test_a_resumed_run_goes_on_from_the_best_that_was_kept(tmp_path, algorithms):
    saving = {'save_folder': str(tmp_path / 'ckpt'), 'save_interval': '2ba', 'save_overwrite': True}
    series = Series()
    trainer = build(classifier(), best(tmp_path / 'slim'), series, schedulers=falling, **saving)
    trainer.state.algorithms += algorithms
    trainer.fit(duration='10ba')
    trainer.close()
    assert (tmp_path / 'slim.best.pt').is_file()
    chosen = max(series.found, key=series.found.__getitem__)
    whole = load_file(tmp_path / 'slim' / 'model.safetensors')
    after = next((tmp_path / 'ckpt').glob(f'*ba{max(chosen, 8)}*'))
    again = build(classifier(seed=1), best(tmp_path / 'slim'), schedulers=falling, load_path=str(after), **saving)
    again.state.algorithms += algorithms
    again.fit(duration='2ba')
    found = load_file(tmp_path / 'slim' / 'model.safetensors')
    assert f'after batch {chosen} ' in card_of(tmp_path / 'slim')
    assert all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.parametrize('kept', ['of a later batch', 'of another run'])
def test_what_another_run_kept_does_not_count(tmp_path, kept):
    saving = {'save_interval': '2ba', 'save_overwrite': True, 'schedulers': falling}
    build(classifier(), best(tmp_path / 'slim'), save_folder=str(tmp_path / 'one'), **saving).fit(duration='10ba')
    start = 2
    if kept == 'of another run':
        start = 10
        other = build(classifier(seed=3), best(tmp_path / 'other'), save_folder=str(tmp_path / 'other-ckpt'), **saving)
        other.fit(duration='2ba')
        (tmp_path / 'other.best.pt').rename(tmp_path / 'slim.best.pt')
    (checkpoint,) = (tmp_path / 'one').glob(f'*-ba{start}-*')
    more = {'save_folder': str(tmp_path / 'two'), 'load_path': str(checkpoint)}
    build(classifier(seed=1), best(tmp_path / 'slim'), **saving, **more).fit(duration='2ba')
    facts = json.loads((tmp_path / 'slim' / 'config.json').read_text())['dhrd']['best']
    assert start < facts['batch'] <= start + 2


def test_a_file_of_other_making_stays_and_one_of_an_earlier_run_does_not_count(tmp_path):
    (tmp_path / 'slim.best.pt').write_text('mine')
    with pytest.raises(UserError, match=r'slim\.best\.pt: found something else than the weights of an evaluation'):
        build(classifier(), best(tmp_path / 'slim')).fit()
    assert (tmp_path / 'slim.best.pt').read_text() == 'mine'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'monitor': 'Acc'}, "monitor: found 'Acc'; expected the name of a metric of eval: MulticlassAccuracy, "),
        ({'monitor': ACCURACY, 'dataloader_label': 'test'}, "dataloader_label: found 'test'; .* evaluation set: eval$"),
        ({'calibrate': 'test'}, "calibrate: found 'test'; expected the name of an evaluation set: eval$"),
        ({'monitor': ACCURACY, 'mode': 'up'}, "mode: found 'up'; expected 'max' or 'min'"),
        ({'mode': 'max'}, 'mode: found without monitor'),
    ],
)
def test_what_there_is_not_is_refused_before_the_first_step(tmp_path, options, message):
    with pytest.raises(UserError, match=f'drop_reasoning_head.{message}'):
        build(classifier(), DropReasoningHead(str(tmp_path / 'slim'), **options)).fit()
    assert [*tmp_path.iterdir()] == []


# A value of each class, and of each pair of them.
SEVERAL = {
    'f1': lambda: MulticlassF1Score(num_classes=3, average=None),
    'confusion': lambda: MulticlassConfusionMatrix(num_classes=3),
}


@pytest.mark.parametrize('name', SEVERAL)
def test_a_metric_of_several_numbers_costs_no_export_and_is_no_monitor(tmp_path, name):
    model, metric = classifier(), SEVERAL[name]()
    model.val_metrics[type(metric).__name__] = metric
    build(model, DropReasoningHead(str(tmp_path / 'slim'))).fit()
    card = card_of(tmp_path / 'slim')
    assert f'| eval | {ACCURACY} | ' in card and type(metric).__name__ not in card
    chooser = DropReasoningHead(str(tmp_path / 'slim'), monitor='it')
    with pytest.raises(
        UserError, match="monitor: found 'it', whose value is not one number; expected a metric of eval"
    ):
        chooser.check_evaluations({'eval': {'it': SEVERAL[name]()}})
    chooser.check_evaluations({'eval': {'it': MulticlassAUROC(num_classes=3)}})  # which gives nothing of no rows


def test_the_first_of_equal_ones_is_best_and_nan_never():
    assert is_better(0.5, None, 'max') and is_better(0.4, 0.5, 'min') and not is_better(0.5, 0.5, 'max')
    assert not is_better(float('nan'), None, 'max')


@pytest.mark.parametrize('monitor', [{}, {'monitor': ACCURACY}], ids=['last', 'best'])
@pytest.mark.parametrize(
    ('options', 'dtype'),
    [({}, None), ({'head': 'verbalizer', 'lora': True}, None), ({'head': 'mlp'}, None), ({'head': 'mlp'}, 'bf16')],
    ids=['linear', 'verbalizer-lora', 'mlp', 'mlp-bf16'],
)
def test_a_calibrated_export_gives_the_same_labels_by_logits_divided_by_its_temperature(
    tmp_path, options, dtype, monitor
):
    live = classifier(**options)
    plain = DropReasoningHead(str(tmp_path / 'plain'), **monitor)
    calibrated = DropReasoningHead(str(tmp_path / 'slim'), calibrate='eval', dtype=dtype, **monitor)
    build(live, plain, calibrated, schedulers=falling).fit(duration='8ba')
    facts = json.loads((tmp_path / 'slim' / 'config.json').read_text())['dhrd']['calibration']
    assert facts['rows'] == 7 and facts['rows_of'] == 'eval' and facts['temperature'] != 1

    batch = TripletCollator(tiny_tokenizer(), LABELS, reasoning=False)(triplets(7))
    inputs = {key: batch[key] for key in ('input_ids', 'attention_mask')}
    logits = []
    for name in ('plain', 'slim'):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
        with torch.no_grad():
            logits.append(model(**inputs).logits.float())
    rounding = (0.1 if dtype else 1e-5) * float(logits[1].abs().max())
    torch.testing.assert_close(logits[1], logits[0] / facts['temperature'], atol=rounding, rtol=0)
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    card = card_of(tmp_path / 'slim')
    assert f'the temperature {facts["temperature"]:.4f}, fitted on 7 rows of eval' in card

    report = report_on(tmp_path / 'slim', [rows_file(tmp_path)])
    if dtype is None:  # of so few rows one that falls into another bin by rounding counts much
        assert report['calibration']['ece'] == pytest.approx(facts['ece_after'], abs=1e-4)
        assert report['calibration']['before']['ece'] == pytest.approx(facts['ece_before'], abs=1e-4)
    assert re.search(r'without the temperature \d', describe(report))


def test_what_is_known_of_an_earlier_exports_weights_is_not_told_of_those_trained_from_it(tmp_path):
    earlier = {'calibration': {'temperature': 3.0, 'rows': 5}, 'best': {'metric': ACCURACY, 'value': 0.9, 'batch': 77}}
    model = stock_classifier(dhrd={'task': None, 'max_seq_len': 9, **earlier})
    fit(model, [AuxiliaryReasoningLoss()], tokenised(), collator(), callbacks=[DropReasoningHead(f'{tmp_path}/slim')])
    assert facts_of(tmp_path / 'slim') == {'task': None, 'max_seq_len': 9}
    assert load_classifier(tmp_path / 'slim').temperature is None


def test_composers_evaluation_after_the_fits_end_counts(tmp_path):
    """It comes where the interval, of two batches, does not divide the duration; the last step alone learns."""
    series, callback = Series(), best(tmp_path / 'slim', calibrate='eval')
    schedule = {'schedulers': lambda state: 3.0 * (state.timestamp.batch >= 5)}
    build(classifier(), callback, series, **schedule).fit(duration='7ba')
    assert list(series.found) == [2, 4, 6, 7] and series.found[7] > series.found[6]
    facts, report = facts_of(tmp_path / 'slim'), report_on(tmp_path / 'slim', [rows_file(tmp_path)])
    assert facts['best']['batch'] == 7 and report['metrics']['accuracy'] == pytest.approx(series.found[7])
    assert report['calibration']['ece'] == pytest.approx(facts['calibration']['ece_after'], abs=1e-4)


@pytest.mark.parametrize('average', [EMA(half_life='1ep', update_interval='1ep'), SWA(swa_start='0ep', swa_end='1ep')])
def test_the_card_tells_nothing_of_weights_that_were_averaged_after_their_evaluation(tmp_path, average):
    """The evaluation of the second batch, the epoch's last, comes before the epoch's end."""
    for algorithms, told in (([], True), ([average], False)):
        trainer = build(classifier(), DropReasoningHead(str(tmp_path / 'slim')))
        trainer.state.algorithms += algorithms
        trainer.fit(duration='2ba')
        assert ('## Evaluation' in card_of(tmp_path / 'slim')) is told


def highest_and_lowest(tmp_path):
    """Two exports: of the best evaluation and of the worst, so that one of them is not the first."""
    choice = {'monitor': ACCURACY, 'dataloader_label': 'eval'}
    return [DropReasoningHead(str(tmp_path / mode), mode=mode, **choice) for mode in ('max', 'min')]


def test_a_second_fit_from_the_start_knows_nothing_of_the_firsts_evaluations(tmp_path):
    trainer = build(classifier(), *highest_and_lowest(tmp_path))
    for evaluator in trainer.state.evaluators:
        evaluator.eval_interval = '1ep'
    for options in ({}, {'reset_time': True}):
        trainer.fit(duration='1ep', **options)
        for mode in ('max', 'min'):
            report = report_on(tmp_path / mode, [rows_file(tmp_path)])
            assert report['metrics']['accuracy'] == pytest.approx(facts_of(tmp_path / mode)['best']['value'])


def test_without_an_evaluation_of_the_last_batch_the_export_is_whole_but_the_run_says_so(tmp_path):
    trainer = build(classifier(), DropReasoningHead(str(tmp_path / 'slim'), calibrate='eval'))
    for evaluator in trainer.state.evaluators:
        evaluator.eval_interval = lambda state, event: event == Event.BATCH_END and state.timestamp.batch == 2
    with pytest.raises(UserError, match=r'found no evaluation of eval after the batch that is exported; .* is whole'):
        trainer.fit(duration='3ba')
    assert 'Calibration' not in card_of(tmp_path / 'slim')


def test_five_epochs_of_a_yaml_whose_best_is_the_second(tmp_path, capsys):
    write_inputs(tmp_path)
    slim = tmp_path / 'slim-ep5'
    export = f'{{output_dir: "{tmp_path}/slim-ep{{epoch}}", monitor: {ACCURACY}, calibrate: val}}'
    config = config_of(
        tmp_path,
        'one',
        'untied',
        f'callbacks.drop_reasoning_head={export}',
        'scheduler={name: multi_step_with_warmup, milestones: [2ep], gamma: 300}',
        'max_duration=5ep',
        'eval_interval=1ep',
    )
    trainer = train(config)
    (log,) = [found.data for found in trainer.logger.destinations if hasattr(found, 'data')]
    series = {int(time.epoch): float(value) for time, value in log[f'metrics/val/{ACCURACY}']}
    chosen = max(series, key=series.__getitem__)
    assert list(series) == [1, 2, 3, 4, 5] and chosen == 2 and series[5] < series[2], series
    report = report_on(slim, [tmp_path / 'val.jsonl'])
    assert report['metrics']['accuracy'] == pytest.approx(series[chosen])
    (file,) = tmp_path.rglob('summary.json')
    summary, batch = json.loads(file.read_text()), facts_of(slim)['best']['batch']
    assert summary['export'] == str(slim) and summary['best']['value'] == series[chosen]
    assert summary['metrics']['val'][ACCURACY] == series[5]  # of the last weights
    printed = capsys.readouterr().out.splitlines()
    assert f'exported: the weights of batch {batch}, val {ACCURACY} {series[chosen]:.4f}' in printed
    assert f'slim classifier: {slim}' in printed
    card = card_of(slim)
    assert f'(epoch {chosen})' in card and f'| val | {ACCURACY} | {report["metrics"]["accuracy"]:.4f} |' in card
    assert f'and is {report["calibration"]["ece"]:.4f}' in card
    assert f'was {report["calibration"]["before"]["ece"]:.4f}' in card


# The rate is 300 times as high from the tenth step on, so that the best evaluation comes before.
CLIMBS = (
    'scheduler={name: multi_step_with_warmup, t_warmup: 0ba, milestones: [10ba], gamma: 300}',
    'algorithms.auxiliary_reasoning_loss.schedule=null',
    'save_interval=4ba',
    'save_num_checkpoints_to_keep=-1',
    'autoresume=true',
)


def two_ranks(root, *overrides):
    """Train on two ranks of FSDP2, with sharded checkpoints; the export."""
    run_ranks(2, Path(__file__).parents[1] / 'chosen_runs.py', root, 'fsdp2', 'untied-lora', *CLIMBS, *overrides)
    return root / 'fsdp2' / 'untied-lora' / 'slim'


@pytest.fixture(scope='module')
def on_two_ranks(tmp_path_factory):
    """The export of a run that nothing stops."""
    root = tmp_path_factory.mktemp('straight')
    write_inputs(root)
    return two_ranks(root)


def facts_of(slim):
    return json.loads((slim / 'config.json').read_text())['dhrd']


def test_two_ranks_of_fsdp_keep_and_calibrate_by_every_row_once(on_two_ranks):
    """31 rows: one of the ranks gets a row of the other's besides."""
    facts = facts_of(on_two_ranks)
    report = report_on(on_two_ranks, [on_two_ranks.parents[2] / 'val.jsonl'])
    assert facts['calibration']['rows'] == report['rows'] == 31
    assert report['metrics']['accuracy'] == pytest.approx(facts['best']['value'])
    assert report['calibration']['ece'] == pytest.approx(facts['calibration']['ece_after'], abs=1e-4)


def test_sharded_checkpoints_of_two_ranks_resume_to_the_same_best_and_temperature(on_two_ranks, tmp_path):
    """Stopped after a better evaluation than any that follows: what is exported was kept before."""
    write_inputs(tmp_path)
    slim = two_ranks(tmp_path, 'max_duration=12ba')
    checkpoints = slim.parent / 'checkpoints'
    assert (checkpoints / 'ep1-ba12' / '.metadata').is_file() and not [*checkpoints.glob('ep*-ba16')]
    written = (checkpoints / 'ep1-ba12' / '.metadata').stat().st_mtime_ns
    assert two_ranks(tmp_path) == slim and (checkpoints / 'ep2-ba20' / '.metadata').is_file()
    assert (checkpoints / 'ep1-ba12' / '.metadata').stat().st_mtime_ns == written  # it went on, and did not start anew
    found, expected = facts_of(slim), facts_of(on_two_ranks)
    assert found['best'] == expected['best'] and found['best']['batch'] <= 12
    assert found['calibration'] == expected['calibration']
    weights, straight = (load_file(folder / 'model.safetensors') for folder in (slim, on_two_ranks))
    assert all(torch.equal(weights[name], value) for name, value in straight.items())
