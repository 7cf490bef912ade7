"""A trained classifier that is too sure, calibrated on one half of the sample's validation rows, on the other half."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dhrd_plugin import load_config, train
from dhrd_plugin.evaluate import report_on

pytestmark = pytest.mark.usefixtures('one_thread')


def write_model(folder, texts):
    """A random backbone that reads words."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(['<pad>', '<unk>', *words])}, '<unk>'))
    tokenizer.pre_tokenizer = splitter
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', unk_token='<unk>').save_pretrained(folder)
    shape = {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    torch.manual_seed(0)
    config = LlamaConfig(**shape, vocab_size=len(words) + 2, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture
def config(tmp_path, sample):
    """A run that learns a third of the validation rows by heart, so that it is sure of the others too, and wrong."""
    lines = (sample / 'validation.jsonl').read_text().splitlines()
    write_model(tmp_path / 'model', lines)
    parts = {'train': lines[::3], 'fitted': lines[::2], 'other': lines[1::2]}
    loaders = {}
    for name, part in parts.items():
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(part))
        loaders[name] = {'source': str(tmp_path / f'{name}.jsonl'), 'cache_dir': str(tmp_path / 'cache')}
    settings = {
        'output_dir': str(tmp_path / 'run'),
        'task': 'rte',
        'max_seq_len': 512,
        'model': {'pretrained_model_name_or_path': str(tmp_path / 'model'), 'pooling': 'mean', 'padding_free': False},
        'train_loader': loaders.pop('train'),
        'eval_loaders': loaders,
        'optimizer': {'name': 'adamw', 'lr': 0.01},
        'callbacks': {'drop_reasoning_head': {'output_dir': '${output_dir}/slim', 'calibrate': 'fitted'}},
        'max_duration': '12ep',
        'eval_interval': '12ep',
        'global_train_batch_size': 10,
        'device': 'cpu',
        'progress_bar': False,
        'log_to_console': False,
    }
    OmegaConf.save(OmegaConf.create(settings), tmp_path / 'run.yaml')
    return load_config(tmp_path / 'run.yaml')


def test_the_error_of_the_other_half_is_lower_and_its_accuracy_the_same(config, tmp_path):
    trainer = train(config)
    live = float(trainer.state.eval_metrics['other']['MulticlassAccuracy'].compute())
    slim = tmp_path / 'run' / 'slim'
    facts = json.loads((slim / 'config.json').read_text())['dhrd']['calibration']
    report = report_on(slim, [tmp_path / 'other.jsonl'])
    before, after = report['calibration']['before']['ece'], report['calibration']['ece']
    assert facts['rows'] == report['rows'] == 75 and facts['rows_of'] == 'fitted'
    assert 1 < facts['temperature'] < 50 and facts['ece_after'] < facts['ece_before']
    assert after < before
    assert report['metrics']['accuracy'] == pytest.approx(live)
