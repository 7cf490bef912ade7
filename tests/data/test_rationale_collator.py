"""What becomes of the rows that a pipeline already has."""

import pickle

import pytest
import torch
from tiny import LABELS, VOCAB, byte_tokenizer, tiny_tokenizer, triplets
from transformers import BatchEncoding, DataCollatorWithPadding, default_data_collator

from dhrd_plugin import RationaleCollator, TripletCollator
from dhrd_plugin.data.collator import Markers
from dhrd_plugin.errors import UserError

NONE = -100


def ids(text):
    return [VOCAB[word] for word in text.split()]


def row(text='w1 w2 w3', label=1, rationale='w4 w5', **fields):
    tokens = ids(text)
    return {'input_ids': tokens, 'attention_mask': [1] * len(tokens), 'label': label, 'rationale': rationale} | fields


def collate(rows, label_names=LABELS, side='right', **options):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return RationaleCollator(tokenizer, label_names, **options)(rows)


def bare(rows):
    return [{key: value for key, value in row.items() if key not in ('rationale', 'answer')} for row in rows]


@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('options', [{}, {'layout': 'label_first', 'rationale_max_tokens': 2}])
def test_the_batch_is_that_of_the_triplets(side, options):
    rows = triplets()
    theirs = [
        {**tiny_tokenizer()(item['input_text']), 'label': LABELS.index(item['label']), 'rationale': item['rationale']}
        for item in rows
    ]
    found = collate(theirs, side=side, **options)
    expected = TripletCollator(tiny_tokenizer(), LABELS, padding_side=side, **options)(rows)
    assert found.keys() == expected.keys() and found.pop('spans') == expected.pop('spans')
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize('theirs', [DataCollatorWithPadding(tiny_tokenizer()), default_data_collator, None])
@pytest.mark.parametrize('given', [{'rationale': None}, {}])
def test_without_a_rationale_the_batch_is_their_own(theirs, given):
    rows = [{**row('w1 w2 w3'), 'idx': 4}, {**row('w6 w7 w8', 2), 'idx': 9}]
    plain = bare(rows)
    expected = (theirs or DataCollatorWithPadding(tiny_tokenizer()))(plain)
    found = collate([{**item, **given} for item in plain], collate_fn=theirs)
    assert type(found) is type(expected) and list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_without_reasoning_rows_with_a_rationale_give_their_own_batch():
    """For a stock classifier, which would pool the answer."""
    expected = DataCollatorWithPadding(tiny_tokenizer())(bare([row(answer='maybe')]))
    found = collate([row(answer='maybe')], reasoning=False)
    assert list(found) == list(expected) and all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_they_return_is_handed_on_as_it_is():
    batch = BatchEncoding({'anything': torch.ones(2)})
    assert collate([{'text': 'w1'}, {'text': 'w2'}], collate_fn=lambda rows: batch) is batch


def test_their_collator_never_sees_our_fields():
    seen = []

    def theirs(rows):
        seen.extend(rows)
        return DataCollatorWithPadding(tiny_tokenizer())(rows)

    collate([row(answer='maybe')], collate_fn=theirs)
    assert seen == bare([row()])


@pytest.mark.parametrize('side', ['right', 'left'])
def test_rows_that_they_padded_to_one_length(side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    texts = ['w1 w2 w3', 'w9']
    rows = [
        {**tokenizer(text, padding='max_length', max_length=9), 'label': 1, 'rationale': rationale}
        for text, rationale in zip(texts, ['w4 w5', None])
    ]
    batch = RationaleCollator(tokenizer, LABELS, default_data_collator)(rows)
    long, pads = ids('w1 w2 w3 <REASON> w4 w5 <ANS> no'), [0] * 7
    assert batch['input_ids'].tolist() == [long, [VOCAB['w9'], *pads] if side == 'right' else [*pads, VOCAB['w9']]]
    assert batch['pool_index'].tolist() == ([2, 0] if side == 'right' else [2, 7])
    assert batch['labels'].tolist() == [1, 1]
    assert batch['reasoning_labels'].tolist() == [[NONE, *long[1:]], [NONE] * 8]


def test_raw_text_that_their_collator_tokenises():
    tokenizer = tiny_tokenizer(bos=True)

    def theirs(rows):
        batch = tokenizer([item['text'] for item in rows], padding=True, return_tensors='pt')
        return {**batch, 'labels': torch.tensor([item['y'] for item in rows]), 'ids': torch.arange(len(rows))}

    rows = [{'text': 'w1 w2', 'y': 2, 'why': 'w7'}, {'text': 'w3', 'y': 0, 'why': ''}]
    batch = RationaleCollator(tokenizer, LABELS, theirs, rationale_key='why')(rows)
    short = [*ids('<s> w3 <ANS> yes'), 0, 0, 0]
    assert batch['input_ids'].tolist() == [ids('<s> w1 w2 <REASON> w7 <ANS> maybe'), short]
    assert batch['pool_index'].tolist() == [2, 1] and batch['ids'].tolist() == [0, 1]


def test_token_types_go_along():
    rows = [row('w1 w2 w3', token_type_ids=[0, 1, 1]), row('w9', token_type_ids=[1], rationale=None)]
    batch = collate(rows)
    assert batch['token_type_ids'].tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ('limit', 'text', 'cut'),
    [(7, 'w1 w2 w3 <REASON> w4 <ANS> no', 1), (6, 'w1 w2 w3', 2), (None, 'w1 w2 w3 <REASON> w4 w5 <ANS> no', 0)],
)
def test_the_rationale_is_cut_never_the_input(limit, text, cut):
    batch = collate([row()], max_seq_len=limit)
    assert batch['input_ids'].tolist() == [ids(text)] and batch['pool_index'].tolist() == [2]
    assert batch.get('rationale_cut', torch.zeros(1)).tolist() == [cut]


def test_the_tokenizers_limit_holds_where_none_is_given():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 7
    batch = RationaleCollator(tokenizer, LABELS)([row()])
    assert batch['input_ids'].tolist() == [ids('w1 w2 w3 <REASON> w4 <ANS> no')]


def test_answers_targets_and_markers():
    batch = collate([row(answer='maybe')], label_names=None, reasoning_targets='rationale')
    text = ids('w1 w2 w3 <REASON> w4 w5 <ANS> maybe')
    assert batch['input_ids'].tolist() == [text]
    assert batch['reasoning_labels'].tolist() == [[NONE] * 4 + text[4:]]
    tokenizer = byte_tokenizer()
    found = RationaleCollator(tokenizer, ['no', 'yes'], markers=Markers('[why]', '[so]'))(
        [{**tokenizer('Is it?'), 'label': 1, 'rationale': 'It is.'}]
    )
    assert tokenizer.decode(found['input_ids'][0]) == 'Is it? [why] It is. [so] yes'


def test_labels_as_long_as_the_batch_are_no_tokens():
    """Of several labels each a row: with an answer of their own they are theirs to use, and stay as they are."""

    def theirs(rows):
        batch = DataCollatorWithPadding(tiny_tokenizer())([{**item, 'label': 0} for item in rows])
        return {**batch, 'labels': torch.tensor([[1, 0, 1], [0, 1, 1]])}

    rows = [row('w1 w2 w3', answer='maybe'), row('w9', answer='yes')]
    batch = collate(rows, collate_fn=theirs)
    assert batch['labels'].tolist() == [[1, 0, 1], [0, 1, 1]] and batch['input_ids'].shape[1] > 3


@pytest.mark.parametrize(
    ('values', 'kept'),
    [
        (torch.tensor([[0.25, 0.5, 0.75], [0.1, 0.2, 0.3]], dtype=torch.float64), True),  # features
        (torch.tensor([[4, 5, 6], [7, 8, 9]]), True),  # values where the second row has no token
        (torch.tensor([[4, 5, 6], [7, 0, 0]]), False),
        (torch.tensor([[True, True, False], [True, False, False]]), False),
    ],
)
def test_what_goes_along_with_the_tokens_is_whole(values, kept):
    def theirs(rows):
        return {**DataCollatorWithPadding(tiny_tokenizer())(rows), 'extra': values}

    batch = collate([row('w1 w2 w3'), row('w9', rationale=None)], collate_fn=theirs)
    extra, longer = batch['extra'], batch['input_ids'].shape[1]
    assert extra.dtype == values.dtype
    assert torch.equal(extra, values) if kept else torch.equal(extra[:, :3], values) and extra.shape == (2, longer)


def test_nan_is_a_missing_rationale_as_pandas_has_it():
    rows = [row(rationale=float('nan')), row('w9', answer=float('nan'))]
    expected = collate([row(rationale=None), row('w9')])
    found = collate(rows)
    assert found.pop('spans') == expected.pop('spans')
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert 'reasoning_labels' not in collate([row(rationale=float('nan'))])


@pytest.mark.parametrize('labels', [['no'], torch.tensor([1]), [1], torch.tensor([True])])
def test_labels_are_indices_or_names(labels):
    def theirs(rows):
        return {**DataCollatorWithPadding(tiny_tokenizer())(rows), 'labels': labels}

    batch = collate([row()], collate_fn=theirs, label_names={0: 'yes', 1: 'no', 2: 'maybe'})
    assert batch['input_ids'][0, -1] == VOCAB['no']


def labelled(values, **more):
    """A collate_fn whose batch holds these labels."""
    return {'collate_fn': lambda rows: {**DataCollatorWithPadding(tiny_tokenizer())(rows), 'labels': values, **more}}


def test_it_can_be_sent_to_worker_processes():
    rows = [row(), row('w9 w8', rationale=None)]
    sent = pickle.loads(pickle.dumps(RationaleCollator(tiny_tokenizer(), LABELS)))
    assert torch.equal(sent(rows)['input_ids'], collate(rows)['input_ids'])


@pytest.mark.parametrize(
    ('rows', 'options', 'reason'),
    [
        ([row()], {'label_names': None}, 'row 0: answer: missing, and label_names has no name for label 1'),
        ([row(id=7, label=5)], {}, 'row 7: answer: missing, and label_names has no name for label 5'),
        ([row()], {'max_seq_len': 2}, 'row 0: input_text: found 3 tokens; expected at most max_seq_len=2'),
        (
            [row()],
            {'collate_fn': lambda rows: {'labels': torch.ones(1), 'input_ids': torch.ones(1, 3)}},
            "attention_mask: the batch holds only ['input_ids', 'labels']; expected a collate_fn that tokenises",
        ),
        ([row()], {'reasoning_targets': 'all'}, "reasoning_targets: found 'all'"),
        ([row(rationale=['w4'])], {}, 'row 0, field rationale: found ["w4"]; expected text'),
        ([row(), row(id='b', rationale=5)], {}, 'row b, field rationale: found 5; expected text'),
        ([row(rationale=True)], {}, 'row 0, field rationale: found true; expected text'),
        ([row(rationale='w\ud800')], {}, 'row 0, field rationale: is not valid Unicode'),
        ([{**bare([row()])[0], 'why': {}}], {'rationale_key': 'why'}, 'row 0, field why: found {}; expected text'),
        ([row(answer='')], {}, 'row 0, field answer: is empty'),
        ([row(answer=1)], {}, 'row 0, field answer: found 1; expected text'),
        (
            [row()],
            labelled(torch.tensor([[0, 2, 1]])),
            'row 0: labels: found [0, 2, 1]; expected the index of one class, or a zero or one for each',
        ),
        ([row()], labelled(torch.tensor([[0.0, 1.0]])), 'row 0: labels: found [0.0, 1.0]; expected the index of one'),
        ([row()], labelled(torch.tensor([0.7])), 'row 0: labels: found 0.699'),
        ([row()], labelled(torch.tensor(1)), 'row 0: labels: found tensor(1); expected one label a row'),
        ([row()], labelled(['perhaps']), 'row 0: answer: missing, and label_names has no name for label perhaps'),
        ([row()], labelled(torch.tensor([-100])), 'label_names has no name for label -100'),
        ([row()], {'label_names': {0: 'yes'}}, 'label_names has no name for label 1'),
        ([row()], {'label_names': {1: 'yes'}}, 'label_names: found the labels [1]; expected a name for each of 0, 1'),
        ([row()], {'label_names': {'yes': 0}}, "label_names: found the labels ['yes']; expected a name for each"),
        ([row()], {'label_names': 'yes'}, "label_names: found 'yes'; expected a list of texts"),
        ([row()], {'label_names': ['no', 1]}, "label_names: found ['no', 1]; expected a list of texts"),
        ([row()], {'label_names': ['no', 'no']}, "label_names: found ['no', 'no']; expected each name once"),
        (
            [row(id=4)],
            labelled([1], reasoning_weight=torch.tensor([float('nan')])),
            'row 4, field reasoning_weight: found nan; expected a finite number, zero or more',
        ),
        ([row()], labelled([1], classification_weight=[-1.0]), 'row 0, field classification_weight: found -1.0'),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(rows, options, reason):
    with pytest.raises(UserError) as error:
        collate(rows, **options)
    assert reason in str(error.value) and '\n' not in str(error.value)
