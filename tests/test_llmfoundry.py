"""The parts that llm-foundry finds, found and called as it does; llm-foundry itself: tests/llmfoundry/check.py."""

import sys
from importlib.metadata import entry_points

import pytest
import torch
from composer import Evaluator, Trainer
from composer.algorithms import GradientClipping
from composer.core import Algorithm, Callback
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from composer.optim import CosineAnnealingWithWarmupScheduler
from configs import RANDOM
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from dhrd_plugin import AuxiliaryReasoningLoss, ComposerDualHeadClassifier, DropReasoningHead
from dhrd_plugin.errors import UserError
from dhrd_plugin.training import registry

# Group, name, and what llm-foundry holds it against before it calls it.
PARTS = {
    'algorithms': ('auxiliary_reasoning_loss', Algorithm),
    'callbacks': ('drop_reasoning_head', Callback),
    'models': ('dual_head_classifier', ComposerModel),
    'tokenizers': ('triplet_tokenizer', PreTrainedTokenizerBase),
    'dataloaders': ('triplets', None),
}
ROWS = 31
KEYS = [
    'model.lora.lora_dropout=0.0',
    'model.head=verbalizer',
    'train_loader.layout=label_first',
    'train_loader.rationale_max_tokens=40',
]


def registered(group: str):
    (entry,) = entry_points(group=f'llmfoundry_{group}', name=PARTS[group][0])
    return entry.load()


def build(group: str, **settings):
    """As llm-foundry's construct_from_registry."""
    part, kind = registered(group), PARTS[group][1]
    assert kind is None or issubclass(part, kind)
    return part(**settings)


def fit(root, out, *overrides: str):
    """The order and the arguments of llm-foundry 0.22.0's train(), on its YAML."""
    given = [*RANDOM, f'variables.output_dir={out}', *overrides]
    yaml = OmegaConf.merge(OmegaConf.load(root / 'yamls' / 'llmfoundry' / 'rte.yaml'), OmegaConf.from_dotlist(given))
    config = OmegaConf.to_container(yaml, resolve=True)
    torch.manual_seed(config['seed'])
    names = [config[key].pop('name') for key in ('tokenizer', 'model', 'train_loader')]
    assert names == ['triplet_tokenizer', 'dual_head_classifier', 'triplets']
    tokenizer = build('tokenizers', **config['tokenizer']['kwargs'])
    callback = build('callbacks', **config['callbacks']['drop_reasoning_head'])
    algorithm = build('algorithms', **config['algorithms']['auxiliary_reasoning_loss'])
    size = config['global_train_batch_size']
    train_loader = build('dataloaders', tokenizer=tokenizer, device_batch_size=size, **config['train_loader'])
    (settings,) = config['eval_loader']
    assert settings.pop('name') == 'triplets'
    label, size = f'eval/{settings.pop("label")}', config['device_eval_batch_size']
    eval_loader = build('dataloaders', tokenizer=tokenizer, device_batch_size=size, **settings)
    model = build('models', tokenizer=tokenizer, **config['model'])
    metrics = list(model.get_metrics(is_train=False))
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=[
            Evaluator(label=label, dataloader=eval_loader, metric_names=metrics, device_eval_microbatch_size=size)
        ],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),  # its steps show what a gradient weighs, Adam's do not
        schedulers=CosineAnnealingWithWarmupScheduler(t_warmup='0ba'),
        algorithms=[algorithm, GradientClipping(**config['algorithms']['gradient_clipping'])],
        callbacks=[callback],
        loggers=[logger],
        max_duration='2ba',
        progress_bar=False,
        precision=config['precision'],
        device_train_microbatch_size=config['device_train_microbatch_size'],
        seed=config['seed'],
        accumulate_train_batch_on_tokens=config['accumulate_train_batch_on_tokens'],
    )
    trainer.fit()
    return trainer, {name: [float(value) for _, value in values] for name, values in logger.data.items()}


@pytest.fixture(scope='module')
def odd(sample, tmp_path_factory):
    path = tmp_path_factory.mktemp('rows') / 'validation.jsonl'
    path.write_text('\n'.join((sample / 'validation.jsonl').read_text().splitlines()[:ROWS]) + '\n')
    return path


@pytest.fixture(scope='module')
def run(root, odd, tmp_path_factory):
    """Two batches of the YAML, no adapter dropout, and keys that are not in it."""
    out = tmp_path_factory.mktemp('run')
    return *fit(root, out, *KEYS, f'variables.validation={odd}'), out


def test_the_yaml_trains_both_heads_evaluates_each_row_once_and_exports(run):
    trainer, logged, out = run
    assert type(trainer.state.model) is ComposerDualHeadClassifier
    for name in ('total', 'classification', 'reasoning'):
        assert len(logged[f'loss/train/{name}']) == 2
    parts = [logged[f'loss/train/{name}'] for name in ('total', 'classification', 'reasoning')]
    for total, classification, reasoning in zip(*parts):
        assert total == pytest.approx(classification + 0.3 * reasoning, rel=1e-5)
    correct = logged['metrics/eval/validation/MulticlassAccuracy'][-1] * ROWS
    assert correct == pytest.approx(round(correct), abs=1e-4)
    weights = load_file(out / 'slim' / 'model.safetensors')
    assert 'classifier.out_proj.weight' in weights and not any('lora' in name for name in weights)


def test_weighing_microbatches_by_tokens_changes_nothing(root, odd, run, tmp_path):
    """llm-foundry's default. By their true tokens, microbatches of 3 rows would weigh otherwise than one of 8."""
    overrides = [*KEYS, f'variables.validation={odd}', 'device_train_microbatch_size=3']
    _, logged = fit(root, tmp_path, *overrides)
    for name in ('total', 'classification', 'reasoning'):
        assert logged[f'loss/train/{name}'] == pytest.approx(run[1][f'loss/train/{name}'], rel=1e-5)
    weights, expected = (load_file(out / 'slim' / 'model.safetensors') for out in (tmp_path, run[2]))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)


def test_a_schedule_from_the_yaml():
    schedule = {'name': 'linear', 'alpha_f': 0.0, 't_max': '0.5dur'}
    algorithm = build('algorithms', alpha=0.5, schedule=schedule)
    assert type(algorithm) is AuxiliaryReasoningLoss
    assert repr(algorithm) == 'AuxiliaryReasoningLoss(alpha=0.5, beta=1.0, schedule=LinearScheduler)'


def test_markers_as_tokens_grow_the_tokenizer_that_the_model_is_given(sample):
    tokenizer = tiny_tokenizer()
    before = len(tokenizer)
    settings = {'task': 'rte', 'max_seq_len': 512, 'source': str(sample / 'train.jsonl')}
    markers = {'reason': '<because>', 'answer': '<so>', 'as_tokens': True}
    build('dataloaders', tokenizer=tokenizer, device_batch_size=2, markers=markers, **settings)
    assert len(tokenizer) == before + 2


@pytest.mark.parametrize('section', ['algorithms', 'callbacks'])
def test_our_own_yaml_finds_the_packages_own_parts(section):
    """registry.py reads llm-foundry's entry points too."""
    name = PARTS[section][0]
    own = {'algorithms': AuxiliaryReasoningLoss, 'callbacks': DropReasoningHead}
    assert registry.parts(section)[name] is own[section]
    assert registered(section).__name__ == own[section].__name__


MODEL = {'tokenizer': None, 'task': 'rte'}
LOADER = {'tokenizer': None, 'device_batch_size': 8, 'task': 'rte'}


@pytest.mark.parametrize(
    ('group', 'settings', 'expected'),
    [
        ('algorithms', {'alhpa': 1}, "algorithms.auxiliary_reasoning_loss.alhpa: unknown key; did you mean 'alpha'?"),
        ('algorithms', {'schedule': {'name': 'lineal'}}, "unknown name 'lineal'; did you mean 'linear'?"),
        ('algorithms', {'alpha': -1.0}, 'auxiliary_reasoning_loss.alpha: found -1.0; expected a number of 0 or more'),
        ('models', {**MODEL, 'poling': 'last'}, "model.poling: unknown key; did you mean 'pooling'?"),
        (
            'models',
            {**MODEL, 'head': 'mpl'},
            "model.head: found 'mpl'; expected one of ['mlp', 'linear', 'verbalizer']",
        ),
        ('models', {**MODEL, 'init_device': 'meta'}, "model.init_device: found 'meta'; expected 'cpu'"),
        ('models', {**MODEL, 'reasoning_targets': 'rationale'}, 'expected it in train_loader'),
        ('dataloaders', {**LOADER, 'sorce': 'x'}, "train_loader.sorce: unknown key; did you mean 'source'?"),
        ('dataloaders', {**LOADER, 'reasoning_targets': 'all'}, "reasoning_targets: found 'all'"),
        ('dataloaders', {**LOADER, 'evaluation': True, 'sorce': 'x'}, 'eval_loaders.eval.sorce: unknown key'),
        ('dataloaders', {**LOADER, 'source': 'absent.jsonl'}, 'train_loader.source: no such file: absent.jsonl'),
        ('dataloaders', LOADER, 'train_loader: found no rows'),
        ('dataloaders', {**LOADER, 'device_batch_size': 0.5}, 'found a device batch of 0.5 rows'),
        ('tokenizers', {'name': 'package:no_such'}, 'package:no_such: not installed'),
    ],
)
def test_a_mistake_is_one_line(group, settings, expected):
    with pytest.raises(UserError) as error:
        build(group, **settings)
    assert expected in str(error.value)
    assert '\n' not in str(error.value)


def test_llm_foundry_is_not_needed(root, tmp_path, monkeypatch):
    class Refuses:
        def find_spec(self, name, path=None, target=None):
            assert name.split('.')[0] != 'llmfoundry', name

    monkeypatch.setattr(sys, 'meta_path', [Refuses(), *sys.meta_path])
    assert 'llmfoundry' not in sys.modules
    fit(root, tmp_path)


def test_the_seed_decides_on_the_order_of_the_rows(root):
    def order(seed):
        options = {'task': 'rte', 'source': 'sample/train.jsonl', 'seed': seed}
        loader = build('dataloaders', tokenizer=tiny_tokenizer(), device_batch_size=8, **options)
        return next(iter(loader.dataloader))['input_ids'].tolist()

    assert order(17) != order(18)
