"""A head that begins as the LM's own choice among the answers."""

import pytest
import torch
from tiny import KINDS, LABELS, VOCAB, byte_tokenizer, tiny_classifier, tiny_lm, tiny_network, tiny_tokenizer, triplets
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from dhrd_plugin import TripletCollator
from dhrd_plugin.data.collator import Markers
from dhrd_plugin.errors import UserError
from dhrd_plugin.export.write import write_slim
from dhrd_plugin.models.network import DualHeadNetwork

pytestmark = pytest.mark.usefixtures('one_thread')


WORDS = [VOCAB[label] for label in LABELS]


def lm_pass(network, batch):
    """[B, H] and [B, K]: the LM's state at the pooled token, and its logits of the labels' words there."""
    inputs = {key: batch[key] for key in ('input_ids', 'attention_mask')}
    out = network.causal_lm(**inputs, output_hidden_states=True)
    rows = torch.arange(len(batch['pool_index']))
    return out.hidden_states[-1][rows, batch['pool_index']], out.logits[rows, batch['pool_index']][:, WORDS]


SPACE = '\u2581'
OF_THEMSELVES = {
    'Llama 2': {'normalizer': Sequence([Prepend(SPACE), Replace(' ', SPACE)])},
    'Metaspace': {'pre_tokenizer': Metaspace(prepend_scheme='first', split=False)},
}


def spaced_tokenizer(**parts):
    """One of words and letters that puts a space before a text itself."""
    words = [f'{SPACE}{word}' for word in ('Yes', 'No', 'is', 'ice', 'cold')]
    letters = sorted({letter for word in [*words, SPACE, '?<REASON>'] for letter in word})
    whole = [word[:end] for word in words for end in range(2, len(word) + 1)]
    tokens = ['<pad>', '<unk>', *letters, *dict.fromkeys(whole)]
    merges = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, [*merges], unk_token='<unk>'))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', unk_token='<unk>')


@pytest.mark.parametrize('kind', OF_THEMSELVES)
def test_a_tokenizer_that_puts_a_space_before_a_text_gets_no_second(kind):
    """It would be a token of its own, the first of every answer: what the pooled token is trained to predict."""
    tokenizer = spaced_tokenizer(**OF_THEMSELVES[kind])
    rows = [
        {'id': word, 'input_text': 'is ice cold?', 'label': word, 'rationale': 'ice is cold'} for word in ('Yes', 'No')
    ]
    batch = TripletCollator(tokenizer, ['Yes', 'No'], markers=Markers(answer=''), layout='label_first')(rows)
    index = torch.arange(2), batch['pool_index'] + 1
    words = tokenizer.convert_tokens_to_ids([f'{SPACE}Yes', f'{SPACE}No'])
    assert batch['input_ids'][index].tolist() == batch['reasoning_labels'][index].tolist() == words
    begins = [f'{SPACE}is', f'{SPACE}ice', f'{SPACE}cold', '?', f'{SPACE}Yes']
    assert tokenizer.convert_ids_to_tokens(batch['input_ids'][0, :5].tolist()) == begins
    network = DualHeadNetwork(tiny_lm(), 2, head='linear')
    network.resize_token_embeddings(len(tokenizer))
    network.begin_as_answers(tokenizer, ['Yes', 'No'])
    assert torch.equal(network.classifier.out_proj.weight, network.lm_head.weight[words])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('lora', [True, False])
def test_its_first_logits_are_the_lms_own_to_the_bit(kind, tied, lora):
    network = tiny_network(kind, 'verbalizer', tied=tied, lora=lora).eval()
    batch = TripletCollator(tiny_tokenizer(), LABELS, reasoning=False)(triplets())
    logits = network(batch['input_ids'], batch['attention_mask']).logits
    pooled, expected = lm_pass(network, batch)
    assert torch.equal(logits, torch.nn.functional.linear(pooled, network.lm_head.weight[WORDS]))
    # A product with all of the vocabulary adds up in another order.
    torch.testing.assert_close(logits, expected, atol=2e-6, rtol=2e-6)


def test_it_trains_apart_from_the_lm_head():
    network = tiny_network(head='verbalizer', tied=True)
    before = network.lm_head.weight.clone()
    network.classifier.out_proj.weight.data.zero_()
    assert torch.equal(network.lm_head.weight, before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_of_several_tokens_it_is_their_mean(dtype):
    """In fp32, whatever the LM is in."""
    network = DualHeadNetwork(tiny_lm().to(dtype), 3, head='linear')
    network.begin_as_answers(tiny_tokenizer(), ['yes', 'no w9', 'maybe w1 w2'])
    rows = network.classifier.out_proj.weight
    head = network.lm_head.weight.double()
    expected = [head[[VOCAB[word] for word in text.split()]].mean(0) for text in ('yes', 'no w9', 'maybe w1 w2')]
    assert rows.dtype == torch.float32
    assert torch.equal(rows, torch.stack(expected).float())


@pytest.mark.parametrize('as_tokens', [False, True])
@pytest.mark.parametrize('answer', ['[so]', ''])
def test_the_tokens_are_those_that_follow_the_prompt(as_tokens, answer):
    """With the space that a tokenizer makes part of a word, behind a marker of any kind or none."""
    tokenizer = byte_tokenizer()
    if answer:
        Markers('[why]', answer, as_tokens).add_to(tokenizer)
    torch.manual_seed(0)
    lm = tiny_lm()
    lm.resize_token_embeddings(len(tokenizer))
    network = DualHeadNetwork(lm, 2, head='linear')
    network.begin_as_answers(tokenizer, ['a', 'of'])
    row = {'id': '0', 'input_text': 'Is it?', 'label': 'of', 'answer': 'of', 'rationale': ''}
    markers = Markers('[why]', answer, as_tokens and bool(answer))
    (found,) = TripletCollator(tokenizer, ['a', 'of'], markers=markers).encode([row])
    expected = lm.lm_head.weight.double()[found.input_ids[-3:]].mean(0).float()
    assert tokenizer.decode(found.input_ids[-3:]) == ' of'
    assert torch.equal(network.classifier.out_proj.weight[1], expected)


@pytest.mark.parametrize('lora', [True, False])
def test_its_export_is_the_stock_class_and_says_what_the_lm_says(tmp_path, lora):
    model = tiny_classifier(tiny_tokenizer(apart=True), head='verbalizer', lora=lora).eval()
    metadata = model.get_metadata()
    assert metadata['dhrd']['head'] == 'linear'
    write_slim(metadata, model.network.state_dict(), tmp_path / 'slim')
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / 'slim').eval()
    assert type(loaded).__name__ == 'LlamaForSequenceClassification' and loaded.score.bias is None
    batch = TripletCollator(model.tokenizer, LABELS, reasoning=False)(triplets())
    with torch.no_grad():
        found = loaded(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
        torch.testing.assert_close(found, lm_pass(model.network, batch)[1], atol=1e-5, rtol=0)


def biased(lm):
    lm.lm_head.bias = torch.nn.Parameter(torch.arange(len(lm.lm_head.weight)) * 1.0)
    return lm


@pytest.mark.parametrize(
    ('lm', 'options', 'answers', 'words'),
    [
        (tiny_lm(), {'head': 'linear'}, ['yes', 'no'], "answers: found ['yes', 'no']; expected one for each of 3"),
        (tiny_lm(), {'head': 'linear'}, ['yes', 'no', 'no'], "answers: 'no' and 'no' are the same row of the LM head"),
        (tiny_lm(), {'head': 'linear'}, ['yes', 'no', ' '], "answers: ' ' is the tokens []; expected tokens of"),
        (tiny_lm(), {}, LABELS, "answers: found with head, pooling ('mlp', 'last'); expected ('linear', 'last')"),
        (tiny_lm(), {'head': 'linear', 'pooling': 'mean'}, LABELS, "found with head, pooling ('linear', 'mean')"),
        (biased(tiny_lm()), {'head': 'linear'}, LABELS, "answers: the LM head adds a bias to 'yes'; expected"),
    ],
)
def test_what_it_cannot_begin_as_is_refused_in_one_line(lm, options, answers, words):
    network = DualHeadNetwork(lm, 3, **options)
    before = network.classifier.out_proj.weight.clone()
    with pytest.raises(UserError) as error:
        network.begin_as_answers(tiny_tokenizer(), answers)
    assert words in str(error.value) and '\n' not in str(error.value)
    assert torch.equal(network.classifier.out_proj.weight, before)


def test_tokens_that_the_lm_does_not_have_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(['unheard'])
    with pytest.raises(UserError, match=r"answers: 'unheard' is the tokens \[68\]; expected tokens of the LM head"):
        DualHeadNetwork(tiny_lm(), 2, head='linear').begin_as_answers(tokenizer, ['yes', 'unheard'])
