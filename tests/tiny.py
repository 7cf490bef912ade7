"""Tiny random models, a tokenizer and triplets, all made in memory."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dhrd_plugin.models.build import add_lora
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork

KINDS = ('llama', 'gpt2', 'qwen2', 'qwen3')
LABELS = ['yes', 'no', 'maybe']
WORDS = [f'w{i}' for i in range(60)]
VOCAB = {word: i for i, word in enumerate(['<pad>', '<unk>', '<s>', '<REASON>', '<ANS>', *LABELS, *WORDS])}
LORA_TARGETS = {'gpt2': ['c_attn', 'c_proj', 'c_fc']}


def tiny_tokenizer(bos=False, apart=False, eos=False):
    """One token to a word.

    ``bos`` puts ``<s>`` before an input, as Llama's tokenizer does, ``eos`` after it. With ``apart`` no text gives a
    special token, so that none but padding is the pad token.
    """
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token='<unk>'))
    split = [pre_tokenizers.WhitespaceSplit()] + [pre_tokenizers.Punctuation()] * apart
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    if bos or eos:
        single = ' '.join(['<s>'] * bos + ['$A'] + ['<s>'] * eos)
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[('<s>', 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token='<pad>',
        unk_token='<unk>',
        bos_token='<s>',
        model_input_names=['input_ids', 'attention_mask'],  # a decoder has no token types
        **({'split_special_tokens': True} if apart else {}),
    )


def byte_tokenizer():
    """One token to a byte, spaces included; its end of text pads as well."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken('<end>', special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<end>', pad_token='<end>')


def tiny_lm(kind='llama', tied=False, seed=0, hidden=16):
    """A random causal LM of two layers, without dropout."""
    shape = {
        'vocab_size': len(VOCAB),
        'hidden_size': hidden,
        'num_hidden_layers': 2,
        'num_attention_heads': 2,
        'initializer_range': 0.3,
        'tie_word_embeddings': tied,
        'pad_token_id': 0,
        'bos_token_id': 2,
        'eos_token_id': 2,
    }
    modern = {'num_key_value_heads': 1, 'intermediate_size': 24, 'max_position_embeddings': 64}
    config = {
        'llama': lambda: LlamaConfig(**shape, **modern),
        'mistral': lambda: MistralConfig(**shape, **modern),
        'qwen2': lambda: Qwen2Config(**shape, **modern),
        'qwen3': lambda: Qwen3Config(**shape, **modern, head_dim=8),
        'gpt2': lambda: GPT2Config(**shape, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    }[kind]()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def exact(model):
    """To fp64 throughout: transformers' RMSNorm rounds to fp32 in between, torch's does not."""
    for parent in model.modules():
        for name, module in parent.named_children():
            if type(module).__name__.endswith('RMSNorm') and type(module) is not nn.RMSNorm:
                norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
                norm.weight = module.weight
                setattr(parent, name, norm)
    return model.double()


def tiny_network(kind='llama', head='mlp', pooling='last', tied=False, lora=False, seed=0, chunk_size=5, norm=False):
    """A dual-head network; its adapters are not at their initial zero."""
    options = {'head': 'linear' if head == 'verbalizer' else head, 'chunk_size': chunk_size, 'norm': norm}
    network = DualHeadNetwork(tiny_lm(kind, tied, seed), len(LABELS), pooling=pooling, **options)
    nn.init.normal_(network.classifier.out_proj.weight, std=0.3)
    if head == 'verbalizer':
        network.begin_as_answers(tiny_tokenizer(), LABELS)
    if lora:
        targets = {'target_modules': LORA_TARGETS[kind]} if kind in LORA_TARGETS else {}
        add_lora(network, {'r': 2, 'lora_dropout': 0.0, **targets})
        for name, parameter in network.named_parameters():
            if 'lora_B' in name:
                nn.init.normal_(parameter, std=0.1)
    return network


def tiny_classifier(tokenizer=None, multi_label=False, **options):
    """The ComposerModel around :func:`tiny_network`."""
    tokenizer = tokenizer or tiny_tokenizer()
    return ComposerDualHeadClassifier(tiny_network(**options), tokenizer, LABELS, multi_label=multi_label)


def triplet(index=0, words=4, reason=3, label=None):
    """A triplet of so many words; ``reason`` None leaves the rationale out, 0 makes it empty."""
    draw = [WORDS[(7 * index + 3 * i) % len(WORDS)] for i in range(words + (reason or 0))]
    label = label or LABELS[index % len(LABELS)]
    return {
        'id': str(index),
        'input_text': ' '.join(draw[:words]),
        'label': label,
        'answer': label,
        'rationale': None if reason is None else ' '.join(draw[words:]),
        'weight': 1.0,
        'group': '',
        'probabilities': None,
        'cuttable': None,
    }


def triplets(count=8):
    """Rows of unequal length, every third without a rationale."""
    return [triplet(i, 2 + i % 5, None if i % 3 == 2 else 1 + 2 * (i % 4)) for i in range(count)]


def of_several(rows):
    """The rows with none, one or two labels each."""
    return [{**row, 'label': [row['label'], *LABELS][1 : 1 + i % 3]} for i, row in enumerate(rows)]


def relative_error(found, expected):
    """Largest difference over the names' tensors, relative to each tensor's largest value.

    A tensor that is 0 but for rounding (GPT-2's key bias) is measured against the largest of all.
    """
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    return max(
        float((found[name] - value).abs().max()) / max(float(value.abs().max()), 0.01 * largest, 1e-30)
        for name, value in expected.items()
    )
