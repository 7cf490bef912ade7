"""YAMLs and overrides that no run can be made of: refused before a model is loaded."""

import json

import pytest
import yaml
from tiny import LABELS, tiny_lm, tiny_tokenizer

from dhrd_plugin import write_triplets

pytestmark = pytest.mark.usefixtures('one_thread')

STOPPER = 'callbacks.early_stopper={monitor: MulticlassAccuracy'
TASK = {'name': 'tiny', 'prompt': '{text}', 'id': 'id', 'labels': [{'value': label} for label in LABELS]}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    tiny_lm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    """A YAML of a small run, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    rows = [{'id': i, 'text': f'w{i} w{i + 1}', 'label': LABELS[i % 3], 'rationale': 'w1 w2'} for i in range(12)]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'empty.jsonl').write_text('')
    (tmp_path / 'file').write_text('somebody else is here\n')
    settings = {
        'output_dir': 'out',
        'device': 'cpu',
        'task': TASK,
        'model': {'pretrained_model_name_or_path': str(model)},
        'train_loader': {'source': 'rows.jsonl'},
        'eval_loaders': {'val': {'source': 'rows.jsonl'}},
        'optimizer': {'name': 'adamw', 'lr': 1e-3},
        'scheduler': {'name': 'linear'},
        'algorithms': {'auxiliary_reasoning_loss': {}},
        'max_duration': '2ba',
        'max_seq_len': 64,
        'global_train_batch_size': 4,
    }
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(settings))
    return 'run.yaml'


OURS = 'algorithms.auxiliary_reasoning_loss'


@pytest.mark.parametrize(
    ('override', 'words'),
    [
        # numbers out of their ranges
        ('seed=-1', 'seed: found -1; expected a number from 0 to 4294967295'),
        ('seed=4294967296', 'seed: found 4294967296; expected a number from 0 to 4294967295'),
        ('seed=1.5', 'seed: '),
        ('seed=[1]', 'seed: found [1]; expected no list'),
        ('max_seq_len=0', 'max_seq_len: found 0; expected a number of 1 or more'),
        ('global_train_batch_size=-4', 'global_train_batch_size: found -4; expected a number of 1 or more'),
        ('device_eval_batch_size=0', 'device_eval_batch_size: found 0; expected a number of 1 or more'),
        ('device_train_microbatch_size=-1', 'device_train_microbatch_size: found -1; expected a number of 1 or more'),
        ('device_train_microbatch_size=0', 'device_train_microbatch_size: found 0; expected a number of 1 or more'),
        ('device_train_microbatch_size=big', "found 'big'; expected a number of 1 or more, or 'auto'"),
        ('dist_timeout=0', 'dist_timeout: found 0.0; expected a number above 0'),
        ('save_num_checkpoints_to_keep=-2', 'found -2; expected a number of -1 or more'),
        ('train_loader.num_workers=-1', 'train_loader.num_workers: found -1; expected a number of 0 or more'),
        ('eval_loaders.val.num_workers=-1', 'eval_loaders.val.num_workers: found -1; expected a number of 0 or more'),
        ('train_loader.control_seed=-1', 'train_loader.control_seed: found -1; expected'),
        ('train_loader.shuffle_seed=-1', 'train_loader.shuffle_seed: found -1; expected'),
        ('train_loader.rationale_max_tokens=0', 'train_loader.rationale_max_tokens: found 0; expected a number of 1'),
        ('model.chunk_size=0', 'model.chunk_size: found 0; expected a number of 1 or more'),
        ('model.classifier_dropout=1.5', 'model.classifier_dropout: found 1.5; expected a number from 0 to below 1'),
        ('model.label_smoothing=-0.1', 'model.label_smoothing: found -0.1; expected a number from 0 to below 1'),
        ('model.label_smoothing=1', 'model.label_smoothing: found 1.0; expected a number from 0 to below 1'),
        ('model.soft_label_weight=1.5', 'model.soft_label_weight: found 1.5; expected a number from 0 to 1'),
        ('model.class_weights=[1, .nan, 1]', 'model.class_weights: found nan; expected a number above 0'),
        ('model.class_weights=[1, 0, 1]', 'model.class_weights: found 0; expected a number above 0'),
        ('model.class_weights=[1, -2, 1]', 'model.class_weights: found -2; expected a number above 0'),
        ('model.class_weights=even', "model.class_weights: found 'even'; expected a list of numbers, or 'balanced'"),
        ('model.class_weights=[1, 1]', 'model.class_weights: found 2; expected 3, one for each of yes, no, maybe'),
        ('model.lora={r: 0}', 'model.lora.r: found 0; expected a number of 1 or more'),
        ('model.lora={lora_alpha: -1}', 'model.lora.lora_alpha: found -1; expected a number of 1 or more'),
        ('model.lora={lora_dropout: 1.0}', 'model.lora.lora_dropout: found 1.0; expected a number from 0 to below 1'),
        ('model.lora={layers_to_transform: [-1]}', 'model.lora.layers_to_transform: found -1; expected'),
        ('optimizer.lr=.inf', 'optimizer.lr: found inf; expected a number of 0 or more'),
        ('optimizer.lr=.nan', 'optimizer.lr: found nan; expected a number of 0 or more'),
        ('optimizer.lr=-1', 'optimizer.lr: found -1; expected a number of 0 or more'),
        ('optimizer.lr=0', 'optimizer.lr: found 0, which trains nothing; expected a number above 0'),
        ('optimizer.weight_decay=-0.1', 'optimizer.weight_decay: found -0.1; expected a number of 0 or more'),
        ('optimizer.eps=-1', 'optimizer.eps: found -1; expected'),
        (f'{OURS}.alpha=-1', f'{OURS}.alpha: found -1; expected a number of 0 or more'),
        (f'{OURS}.beta=.inf', f'{OURS}.beta: found inf; expected a number of 0 or more'),
        (f'{OURS}={{alpha: 0, beta: 0}}', 'alpha and beta are both 0; nothing would be trained'),
        (f'{OURS}.schedule={{name: linear, alpha_i: .nan}}', 'schedule.alpha_i: found nan; expected'),
        (
            'algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: -1}',
            'algorithms.gradient_clipping.clipping_threshold: found -1; expected a number of 0 or more',
        ),
        (
            'algorithms.gradient_clipping={clipping_type: norms, clipping_threshold: 1}',
            "clipping_type: found 'norms'; did you mean 'norm'?",
        ),
        ('algorithms.ema={half_life: null}', 'algorithms.ema: Either half_life or smoothing must be specified'),
        ('algorithms.ema={half_life: 0ba}', 'algorithms.ema: '),
        ('algorithms.ema={half_life: -1ba}', "algorithms.ema.half_life: found '-1ba'; expected a time of 0 or more"),
        ('model.config_overrides={initializer_range: .inf}', 'initializer_range: found inf; expected a finite number'),
        ('variables={anything: [.nan]}', 'variables.anything: found nan; expected a finite number'),
        # times
        ('max_duration=-1ep', "max_duration: found '-1ep'; expected a time of 1 or more"),
        ('max_duration=0ba', "max_duration: found '0ba'; expected a time of 1 or more"),
        ('max_duration=5', "max_duration: found '5'; expected"),
        ('max_duration=1dur', "max_duration: found '1dur'; expected epochs, batches"),
        ('max_duration=10sec', "max_duration: found '10sec'; expected epochs, batches"),
        ('max_duration=nanep', "max_duration: found 'nanep'; expected a Composer time string"),
        ('eval_interval=-1ep', "eval_interval: found '-1ep'; expected a time of 0 or more"),
        ('eval_interval=0dur', "eval_interval: found '0dur'; expected a share of the run"),
        ('save_interval=0dur', "save_interval: found '0dur'; expected a share of the run"),
        ('console_log_interval=0dur', "console_log_interval: found '0dur'; expected a share of the run"),
        ('save_interval=1iter', "save_interval: found '1iter'; expected epochs, batches or a share"),
        ('save_interval=often', "save_interval: found 'often'; expected a Composer time string"),
        ('console_log_interval=-2ba', "console_log_interval: found '-2ba'; expected a time of 0 or more"),
        (
            'scheduler={name: cosine_with_warmup, t_warmup: -1ba}',
            "scheduler.t_warmup: found '-1ba'; expected a time of 0 or more",
        ),
        (
            'scheduler={name: cosine_with_warmup, t_warmup: soon}',
            "scheduler.t_warmup: found 'soon'; expected a Composer",
        ),
        ('scheduler={name: multi_step, milestones: [soon]}', 'scheduler: cannot be followed over max_duration=2ba: '),
        (
            'callbacks.drop_reasoning_head={output_dir: slim, every: -1ep}',
            "drop_reasoning_head.every: found '-1ep'; expected a time of 0 or more",
        ),
        (
            'callbacks.drop_reasoning_head={output_dir: slim, dtype: fp8}',
            "drop_reasoning_head.dtype: found 'fp8'; expected one of",
        ),
        (
            'callbacks.drop_reasoning_head={output_dir: slim, monitor: Accuracy}',
            "drop_reasoning_head.monitor: found 'Accuracy'; expected the name of a metric of val: MulticlassAcc",
        ),
        (
            'callbacks.drop_reasoning_head={output_dir: slim, calibrate: test}',
            "drop_reasoning_head.calibrate: found 'test'; expected the name of an evaluation set: ",
        ),
        ('callbacks.gradient_comparison={interval: 0ba}', "interval: found '0ba'; expected batches or epochs"),
        # schedules that the run is too short for, or that make no factor
        (
            'scheduler={name: linear, t_max: 0.2dur}',
            'scheduler: cannot be followed over max_duration=2ba: ZeroDivisionError',
        ),
        (
            f'{OURS}.schedule={{name: linear, t_max: 0.2dur}}',
            f'{OURS}.schedule: cannot be followed over max_duration=2ba',
        ),
        ('scheduler={name: linear, alpha_i: 0}', 'scheduler: makes the factor 0 throughout, which trains nothing'),
        # unknown keys and names
        ('sede=1', "sede: unknown key; did you mean 'seed'?"),
        ('model.poling=last', "model.poling: unknown key; did you mean 'pooling'?"),
        ('model.lora.rank=8', 'model.lora.rank: unknown key'),
        ('train_loader.sorce=x', "train_loader.sorce: unknown key; did you mean 'source'?"),
        (f'{OURS}.schedule={{name: linear, alhpa_f: 0}}', "schedule.alhpa_f: unknown key; did you mean 'alpha_f'?"),
        ('callbacks.speed_monitor={windowsize: 3}', "did you mean 'window_size'?"),
        ('loggers.mlflow={experiment: x}', "did you mean 'experiment_name'?"),
        ('optimizer.learning_rate=1', 'optimizer.learning_rate: unknown key'),
        ('compile_config={mod: x}', "compile_config.mod: unknown key; did you mean 'mode'?"),
        ('algorithms.auxiliary_resoning_loss.alpha=1', "did you mean 'auxiliary_reasoning_loss'?"),
        ('optimizer.name=adammw', "did you mean 'adamw'?"),
        ('scheduler.name=cosine_warmup', "did you mean 'cosine_with_warmup'?"),
        ('task=rtee', "unknown task 'rtee'; did you mean 'rte'?"),
        # what is none of a few words, or of another type
        ('model.head=mpl', "model.head: found 'mpl'; expected one of ['mlp', 'linear', 'verbalizer']"),
        ('train_loader.layout=labels_first', "found 'labels_first'; expected one of ['reason_first', 'label_first']"),
        ('train_loader.control=OnlyLabels', "control: found 'OnlyLabels'; expected one of ['ConsistentReasoningLabel"),
        ('train_loader.weights=reason', "weights: found 'reason'; expected one of ['both', 'reasoning']"),
        ('device=cudaa', "device: found 'cudaa'; expected one of"),
        ('device=cuda', "device: found 'gpu', and there is none here; expected cpu"),
        ('precision=fp64', "precision: found 'fp64'; expected one of"),
        ('python_log_level=loud', "python_log_level: found 'loud'; expected one of"),
        ('optimizer.betas=[0.9]', 'optimizer.betas: found [0.9]; expected tuple['),
        ('model.classifier_norm=2.5', 'model.classifier_norm: '),
        (f'{OURS}.alpha=high', "alpha: found 'high'; expected float"),
        # what is no mapping, no task, no YAML
        ('task=null', 'task: found None; expected the name of a task'),
        ('task=5', 'task: found 5; expected the name of a task'),
        ('task=[rte]', "task: found ['rte']; expected no list"),
        ('model=5', 'model: found 5; expected a mapping of keys to values'),
        ('train_loader=rows.jsonl', "train_loader: found 'rows.jsonl'; expected a mapping of keys to values"),
        ('eval_loaders=5', 'eval_loaders: found 5; expected a mapping of keys to values'),
        ('algorithms=[ema]', "algorithms: found ['ema']; expected a mapping of keys to values"),
        (f'{OURS}=3', f'{OURS}: found 3; expected a mapping of arguments'),
        ('model.config_overrides=5', 'model.config_overrides: '),
        ('max_duration=[1', 'max_duration: found a value that is not valid YAML'),
        ('max_duration', 'max_duration: expected an override of the form key=value'),
        ('=5', '=5: expected an override of the form key=value'),
        # places
        ('save_folder=file', 'save_folder: file: found a file; expected a folder'),
        ('output_dir=file', 'output_dir: file: found a file; expected a folder'),
        # what would have no effect, or another's
        ('eval_loaders.train={source: rows.jsonl}', "eval_loaders.train: found 'train', which is Composer's name"),
        (
            f'{STOPPER}, dataloader_label: valid, patience: 1ep}}',
            "early_stopper.dataloader_label: found 'valid'; did you mean 'val'?",
        ),
        (
            f'{STOPPER}, dataloader_label: val, patience: 9sp}}',
            'early_stopper.patience: found 9sp; expected epochs (ep) or batches (ba)',
        ),
        (
            'callbacks.early_stopper={monitor: Acc, dataloader_label: val, patience: 1ep}',
            "early_stopper.monitor: found 'Acc'; expected one of MulticlassAccuracy",
        ),
        (
            'callbacks.threshold_stopper={monitor: MulticlassAccuracy, dataloader_label: valid, threshold: 0.9}',
            "threshold_stopper.dataloader_label: found 'valid'; did you mean 'val'?",
        ),
        (
            'callbacks.threshold_stopper={monitor: Acc, dataloader_label: train, threshold: 0.9}',
            "threshold_stopper.monitor: found 'Acc'; expected one of MulticlassAccuracy",
        ),
        (
            'model={freeze_backbone: true, lora: {}}',
            'model.freeze_backbone: found true with model.lora, whose adapters',
        ),
        (
            'model.freeze_backbone=true',
            'model.freeze_backbone: found true with algorithms.auxiliary_reasoning_loss, which',
        ),
        (
            'model={head: verbalizer, pooling: mean}',
            "model.pooling: found 'mean' with head=verbalizer, which reads what the LM head would; expected 'last'",
        ),
        (
            'model={head: linear, classifier_norm: true}',
            'model.classifier_norm: found true with head=linear; expected head=mlp, or false',
        ),
        # what this machine does not have
        ('precision=amp_bf16', "precision: found 'amp_bf16' on a CPU"),
        ('device_train_microbatch_size=auto', "device_train_microbatch_size: found 'auto' on a CPU"),
        ('fsdp_config={sharding_strategy: FULL_SHARD}', 'fsdp_config: found with one process'),
        # what evaluation does not have
        ('eval_loaders.val.layout=label_first', 'eval_loaders.val.layout: unknown key'),
        ('eval_loaders.val.weights=both', "eval_loaders.val.weights: found 'both'; only train_loader"),
        ('eval_loaders.val.rationale_max_tokens=9', 'eval_loaders.val.rationale_max_tokens: unknown key'),
        # rows and streams
        ('train_loader.source=absent.jsonl', 'train_loader.source: no such file: absent.jsonl'),
        ('train_loader.source=null', 'train_loader: found no rows; expected source, local, remote or streams'),
        ('train_loader.local=x', 'train_loader: found source and local; expected one of them'),
        ('train_loader.source=empty.jsonl', 'empty.jsonl: found no row'),
        ('train_loader.dataset.predownload=-1', 'train_loader.dataset.predownload: found -1; expected'),
        ('train_loader.dataset.epoch_size=0', 'train_loader.dataset.epoch_size: found 0; expected'),
        ('train_loader.dataset.epoch_size=many', "train_loader.dataset.epoch_size: found 'many'"),
        ('train_loader.dataset.num_canonical_nodes=0', 'train_loader.dataset.num_canonical_nodes: found 0; expected'),
        ('train_loader.dataset.shuffle_block_size=-1', 'train_loader.dataset.shuffle_block_size: found -1; expected'),
        ('train_loader.dataset.sampling_granularity=0', 'train_loader.dataset.sampling_granularity: found 0; expected'),
        ('train_loader.dataset.replication=0', 'train_loader.dataset.replication: found 0; expected'),
        ('train_loader.dataset.batching_method=stratfied', "did you mean 'stratified'?"),
        ('train_loader.dataset.sampling_method=fair', "found 'fair'; expected one of balanced, fixed"),
        # what the model's own class refuses
        ('model.config_overrides={hidden_sise: 8}', 'model.config_overrides.hidden_sise: unknown key'),
        ('model.config_overrides={hidden_size: 32}', 'model.pretrained_model_name_or_path: cannot load'),
        ('model.attn_implementation=flash_attention_2', 'FlashAttention2'),
        (
            'model.lora={layers_to_transform: [0, 2]}',
            'model.lora.layers_to_transform: found 2; expected a number from 0 to 1',
        ),
    ],
)
def test_train(refused, run, override, words):
    assert words in refused('train', run, override)


@pytest.mark.parametrize(
    ('answers', 'words'),
    [
        (['w1', 'w2 w3', 'w3 w2'], "'w2 w3' and 'w3 w2' are the same row of the LM head; expected words that differ"),
        (['w1', 'w2', 'w2 w2'], "'w2' and 'w2 w2' are the same row of the LM head"),
        (['unheard', 'w2', 'unseen'], "'unheard' and 'unseen' are the same row of the LM head"),
    ],
)
def test_answers_that_the_lm_head_cannot_tell_apart(refused, run, tmp_path, answers, words):
    labels = [{'value': label, 'answer': answer} for label, answer in zip(LABELS, answers)]
    settings = {'base': run, 'model': {'head': 'verbalizer'}, 'task': {'labels': labels}}
    (tmp_path / 'alike.yaml').write_text(yaml.safe_dump(settings))
    assert refused('train', 'alike.yaml').startswith(f'error: model.head: verbalizer: {words}')


def test_keeping_no_checkpoint(refused, run):
    overrides = ['save_folder=saved', 'save_num_checkpoints_to_keep=0']
    assert 'save_num_checkpoints_to_keep: found 0, which keeps none' in refused('train', run, *overrides)


@pytest.fixture
def shards(tmp_path):
    """Sets ``a``, of 101 rows, ``b``, of 3, and ``foreign``, whose labels are others."""
    for name, count, label in (('a', 101, 'yes'), ('b', 3, 'no'), ('foreign', 6, 'nope')):
        write_triplets([{'id': str(i), 'input_text': f'w{i}', 'label': label} for i in range(count)], tmp_path / name)
    return tmp_path


@pytest.mark.parametrize('method', ['stratified', 'per_stream', 'device_per_stream'])
def test_a_stream_smaller_than_its_share_of_a_batch(refused, run, shards, method):
    streams = 'train_loader.streams={a: {local: a}, b: {local: b}}'
    line = refused('train', run, 'train_loader.source=null', streams, f'train_loader.dataset.batching_method={method}')
    assert line.startswith(
        'error: train_loader.streams.b: found 3 of 104 rows an epoch, too few for batches of 4 a rank'
    )


def test_a_stream_of_which_no_row_is_taken(refused, run, shards):
    streams = 'train_loader.streams={b: {local: b, repeat: 0.01}}'
    line = refused('train', run, 'train_loader.source=null', streams)
    assert line == 'error: train_loader: found no batch of rows in an epoch; expected one or more'


@pytest.mark.parametrize('told', [True, False], ids=['summary', 'rows'])
@pytest.mark.parametrize('kind', ['local', 'remote'])
@pytest.mark.parametrize('key', ['train_loader', 'eval_loaders.val'])
def test_shards_of_foreign_labels(refused, run, shards, key, kind, told):
    if not told:
        (shards / 'foreign' / 'triplets.json').unlink()
        if (key, kind) == ('train_loader', 'remote'):
            pytest.skip('its rows are not here yet')
    line = refused('train', run, f'{key}.source=null', f'{key}.{kind}=foreign')
    assert line.startswith(
        f"error: {key}: foreign: found rows of the label 'nope'; expected those of the task tiny: yes"
    )


@pytest.mark.parametrize('verb', ['show-batch', 'train'])
@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('a: [1', 'not valid YAML'),
        ('[1, 2]', 'found a list; expected a mapping'),
        ('optimizer: {lr: 1', 'not valid YAML'),
        ('task: rte', 'missing'),
        ('base: run.yaml\nseed: -1', 'seed: found -1; expected'),
        ('base: run.yaml\nmodel: linear', "model: found 'linear'; expected a mapping"),
        ('base: run.yaml\noptimizer: {lr: .inf}', 'optimizer.lr: found inf'),
        ('base: run.yaml\nmax_duration: soon', "max_duration: found 'soon'"),
        ("base: run.yaml\noutput_dir: '${oc.env:NO_SUCH_VARIABLE}'", 'NO_SUCH_VARIABLE'),
    ],
)
def test_a_file(refused, run, tmp_path, verb, text, words):
    (tmp_path / 'bad.yaml').write_text(text)
    line = refused(verb, 'bad.yaml')
    assert words in line and 'bad.yaml' in line


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'arms': {'pooled': {'eval_interval': 'x'}}}, "eval_interval: found 'x'"),
        ({'arms': {'pooled': {'optimizer': {'lr': float('nan')}}}}, 'optimizer.lr: found nan'),
        ({'arms': {'pooled': {'model': {'label_smoothing': 2}}}}, 'model.label_smoothing: found 2.0'),
        ({'arms': {'pooled': {'model': {'class_weights': [1, 1]}}}}, 'model.class_weights: found 2; expected 3'),
        ({'arms': {'pooled': {'model': 5}}}, 'arms.pooled: model: found 5; expected a mapping'),
        ({'arms': {'pooled': {'algorithms': {'ema': {'half_life': None}}}}}, 'algorithms.ema: Either half_life'),
        ({'arms': {'dhrd': {}}}, "baseline: found 'pooled'"),
        ({'tasks': {}}, 'tasks: found none'),
        ({'seeds': []}, 'seeds: found none'),
        ({'seeds': [-1]}, 'seed: found -1'),
        ({'tasks': {'a/b': {}}}, "tasks: found 'a/b'; expected a name"),
    ],
)
def test_compare(refused, run, tmp_path, settings, words):
    whole = {'base': 'run.yaml', 'tasks': {'tiny': {}}, 'arms': {'pooled': {}}, 'seeds': [1], **settings}
    (tmp_path / 'compare.yaml').write_text(yaml.safe_dump(whole))
    assert words in refused('compare', 'compare.yaml', 'output_dir=compared')


def test_no_secret_stands_in_a_refusal(refused, run):
    lines = [
        refused('train', run, f'loggers.wandb.{key}={value}')
        for key, value in (('hf_token', 'hunter2'), ('init_kwargs', 'postgresql://h/db?password=hunter2'))
    ]
    assert not [line for line in lines if 'hunter2' in line]
