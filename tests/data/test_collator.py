"""What a row looks like to the model, token by token."""

import pytest
import torch
from tiny import LABELS, VOCAB, byte_tokenizer, tiny_tokenizer, triplet, triplets

from dhrd_plugin.data.collator import Markers, TripletCollator
from dhrd_plugin.data.data_spec import split, split_by_length, triplet_data_spec
from dhrd_plugin.data.lengths import summarise, survey
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.extent import Extent
from dhrd_plugin.models.heads import upto

ROW = {'id': '7', 'input_text': 'w1 w2 w3', 'label': 'no', 'answer': 'maybe', 'rationale': 'w4 w5'}
NONE = -100


def ids(text):
    return [VOCAB[word] for word in text.split()]


def collator(tokenizer=None, **options):
    return TripletCollator(tokenizer or tiny_tokenizer(), LABELS, **options)


def encoded(row=ROW, **options):
    (found,) = collator(**options).encode([row])
    return found


@pytest.mark.parametrize(
    ('rationale', 'targets', 'text', 'supervised'),
    [
        ('w4 w5', 'sequence', 'w1 w2 w3 <REASON> w4 w5 <ANS> maybe', 1),
        ('w4 w5', 'rationale', 'w1 w2 w3 <REASON> w4 w5 <ANS> maybe', 4),
        ('', 'sequence', 'w1 w2 w3 <ANS> maybe', 1),  # the control OnlyLabel
        ('', 'rationale', 'w1 w2 w3 <ANS> maybe', 3),
        (None, 'sequence', 'w1 w2 w3', None),
        (None, 'rationale', 'w1 w2 w3', None),
    ],
)
def test_the_layout_of_a_row(rationale, targets, text, supervised):
    row = encoded({**ROW, 'rationale': rationale}, reasoning_targets=targets)
    assert row.input_ids == ids(text)
    assert row.input_length == 3 and row.cut == 0
    assert row.labels == ([] if supervised is None else [NONE] * supervised + ids(text)[supervised:])


@pytest.mark.parametrize(
    ('rationale', 'markers', 'text', 'first'),
    [
        ('w4 w5', ('<REASON>', '<ANS>'), 'w1 w2 w3 <ANS> maybe <REASON> w4 w5', 4),
        ('w4 w5', ('<REASON>', ''), 'w1 w2 w3 maybe <REASON> w4 w5', 3),  # the pooled token predicts the answer
        ('w4 w5', ('', ''), 'w1 w2 w3 maybe w4 w5', 3),
        ('', ('<REASON>', '<ANS>'), 'w1 w2 w3 <ANS> maybe', 4),
        (None, ('<REASON>', '<ANS>'), 'w1 w2 w3', None),
    ],
)
@pytest.mark.parametrize('targets', ['sequence', 'rationale'])
def test_the_layout_with_the_label_first(rationale, markers, text, first, targets):
    options = {'layout': 'label_first', 'markers': Markers(*markers), 'reasoning_targets': targets}
    row = encoded({**ROW, 'rationale': rationale}, **options)
    supervised = 1 if targets == 'sequence' else first
    assert row.input_ids == ids(text) and row.input_length == 3 and row.cut == 0
    assert row.labels == ([] if first is None else [NONE] * supervised + ids(text)[supervised:])


@pytest.mark.parametrize('as_tokens', [False, True])
@pytest.mark.parametrize('why', ['', '[why]'])
def test_an_empty_marker_is_nothing_also_where_spaces_are_tokens(as_tokens, why):
    tokenizer, markers = byte_tokenizer(), Markers(why, '', as_tokens)
    known, row = len(tokenizer), {**ROW, 'input_text': 'Is it?', 'rationale': 'It is.', 'answer': 'yes'}
    markers.add_to(tokenizer)
    assert len(tokenizer) == known + (as_tokens and bool(why))
    shown = why and (why if as_tokens else f' {why}')
    for layout, text in (('reason_first', f'Is it?{shown} It is. yes'), ('label_first', f'Is it? yes{shown} It is.')):
        found = encoded(row, tokenizer=tokenizer, markers=markers, layout=layout)
        assert tokenizer.decode(found.input_ids) == text


@pytest.mark.parametrize(('rationale', 'cut'), [('w4 w5', 2), ('', 2), (None, 0)])
def test_a_row_whose_reasoning_does_not_fit_is_counted(rationale, cut):
    """Of the control OnlyLabel, which has no rationale to cut, marker and answer are left out."""
    row = encoded({**ROW, 'rationale': rationale}, max_seq_len=4)
    assert row.input_ids == ids('w1 w2 w3') and not row.labels and row.cut == cut


def test_the_answer_defaults_to_the_label():
    row = {key: ROW[key] for key in ('id', 'input_text', 'label', 'rationale')}
    assert encoded(row).input_ids[-1] == VOCAB['no']


def test_special_tokens_stand_before_the_input_alone():
    row = encoded(tokenizer=tiny_tokenizer(bos=True))
    assert row.input_ids == ids('<s> w1 w2 w3 <REASON> w4 w5 <ANS> maybe')
    assert row.input_length == 4


@pytest.mark.parametrize('as_tokens', [False, True])
def test_the_text_between_the_spans_is_spaced_and_no_merge_moves_the_pooled_token(as_tokens):
    tokenizer = byte_tokenizer()
    markers = Markers('[why]', '[so]', as_tokens)
    markers.add_to(tokenizer)
    row = {**ROW, 'input_text': 'Is it?', 'rationale': 'It is.', 'answer': 'yes'}
    found = encoded(row, tokenizer=tokenizer, markers=markers)
    space = '' if as_tokens else ' '
    assert tokenizer.decode(found.input_ids) == f'Is it?{space}[why] It is.{space}[so] yes'
    assert tokenizer.decode(found.input_ids[: found.input_length]) == 'Is it?'
    assert found.input_ids.count(len(tokenizer) - 2) == (1 if as_tokens else 0)


@pytest.mark.parametrize(
    ('limit', 'text', 'cut'),
    [
        (8, 'w1 w2 w3 <REASON> w4 w5 <ANS> maybe', 0),
        (7, 'w1 w2 w3 <REASON> w4 <ANS> maybe', 1),
        (6, 'w1 w2 w3', 2),  # no room for a rationale: all of it goes, never the input
        (3, 'w1 w2 w3', 2),
    ],
)
def test_the_rationale_is_cut_and_counted(limit, text, cut):
    row = encoded(max_seq_len=limit, reasoning_targets='rationale')
    assert row.input_ids == ids(text) and row.input_length == 3 and row.cut == cut
    assert row.labels == ([] if len(row.input_ids) == 3 else [NONE] * 4 + ids(text)[4:])
    batch = collator(max_seq_len=limit)([ROW, triplet(1, 2, None)])
    assert ('rationale_cut' in batch) == bool(cut)
    if cut:
        assert batch['rationale_cut'].tolist() == [cut, 0]


@pytest.mark.parametrize(
    ('limit', 'longest', 'text', 'cut'),
    [
        (8, None, 'w1 w2 w3 <ANS> maybe <REASON> w4 w5', 0),
        (7, None, 'w1 w2 w3 <ANS> maybe <REASON> w4', 1),
        (8, 1, 'w1 w2 w3 <ANS> maybe <REASON> w4', 1),
        (6, None, 'w1 w2 w3 <ANS> maybe', 2),  # no room for a rationale: the label stays
        (5, 1, 'w1 w2 w3 <ANS> maybe', 2),
        (4, None, 'w1 w2 w3', 2),  # nor for the label, which is never cut
        (3, None, 'w1 w2 w3', 2),
    ],
)
def test_with_the_label_first_the_rationale_is_cut_and_never_the_label(limit, longest, text, cut):
    options = {'max_seq_len': limit, 'rationale_max_tokens': longest, 'reasoning_targets': 'rationale'}
    row = encoded(layout='label_first', **options)
    assert row.input_ids == ids(text) and row.input_length == 3 and row.cut == cut
    assert row.labels == ([] if len(row.input_ids) == 3 else [NONE] * 4 + ids(text)[4:])


@pytest.mark.parametrize(('longest', 'cut'), [(1, 1), (2, 0), (3, 0)])
def test_a_limit_of_the_rationale_alone(longest, cut):
    batch = collator(rationale_max_tokens=longest)([ROW, {**ROW, 'rationale': None}])
    text = ids('w1 w2 w3 <REASON> w4 w5 <ANS> maybe')
    assert batch['input_ids'][0].tolist() == (text[:5] + text[6:] if cut else text)
    assert batch.get('rationale_cut', torch.zeros(2)).tolist() == [cut, 0]


@pytest.mark.parametrize('longest', [None, 1, 4])
@pytest.mark.parametrize('limit', [5, 9, 99])
def test_a_survey_counts_the_rows_whose_rationale_a_run_cuts(limit, longest):
    found = survey(triplets(16), collator(rationale_max_tokens=longest))
    batch = collator(rationale_max_tokens=longest, max_seq_len=limit)([row for row in triplets(16) if fits(row, limit)])
    told = summarise(found, 'the run', limit)
    assert told['cut'] == sum(cut > 0 for cut in batch.get('rationale_cut', torch.zeros(0)).tolist())
    assert told['inputs_too_long'] == 16 - len(batch['labels'])


def fits(row, limit):
    return len(row['input_text'].split()) <= limit


@pytest.mark.parametrize('side', ['right', 'left'])
def test_a_batch(side):
    rows = [ROW, {**ROW, 'input_text': 'w9', 'label': 'maybe', 'rationale': None}]
    batch = collator(padding_side=side)(rows)
    long, pads = ids('w1 w2 w3 <REASON> w4 w5 <ANS> maybe'), [0] * 7
    short = [VOCAB['w9'], *pads] if side == 'right' else [*pads, VOCAB['w9']]
    assert batch['input_ids'].tolist() == [long, short]
    assert batch['attention_mask'].tolist() == [[1] * 8, [int(token != 0) for token in short]]
    assert batch['pool_index'].tolist() == ([2, 0] if side == 'right' else [2, 7])
    assert batch['labels'].tolist() == [1, 2]
    assert batch['reasoning_labels'].tolist() == [[NONE, *long[1:]], [NONE] * 8]
    assert batch.pop('spans') == ([(0, 3, 8, 7), (0, 1, 1, 0)] if side == 'right' else [(0, 3, 8, 7), (7, 8, 8, 0)])
    assert set(batch) == {'input_ids', 'attention_mask', 'pool_index', 'labels', 'reasoning_labels'}
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('reason', [True, False])
def test_the_host_knows_where_the_rows_lie(side, reason):
    batch = collator(padding_side=side)([*triplets(), triplet(0, 9, None)])
    mask, labels = batch['attention_mask'], batch['reasoning_labels']
    for rows in (slice(None), slice(3, 5), slice(8, 9)):
        shown = mask[rows] if reason else mask[rows] * upto(mask[rows], batch['pool_index'][rows])
        found = Extent.of(batch['spans'][rows], reason)
        assert found == Extent.read(shown, labels[rows])


@pytest.mark.parametrize('side', ['right', 'left'])
def test_the_first_token_is_never_supervised(side):
    batch = collator(padding_side=side)(triplets())
    first = batch['attention_mask'].argmax(1)
    assert (batch['reasoning_labels'][torch.arange(len(first)), first] == NONE).all()
    pads = batch['attention_mask'] == 0
    assert (batch['reasoning_labels'][pads] == NONE).all()


@pytest.mark.parametrize(
    ('options', 'rows'), [({'reasoning': False}, triplets()), ({}, [triplet(0, 3, None), triplet(1, 4, None)])]
)
def test_without_a_rationale_there_is_nothing_to_supervise(options, rows):
    batch = collator(**options)(rows)
    assert 'reasoning_labels' not in batch
    assert batch['input_ids'].shape[1] == max(len(row['input_text'].split()) for row in rows)


def test_it_pads_to_the_longest_of_the_batch_only():
    assert collator(max_seq_len=60)([ROW])['input_ids'].shape == (1, 8)


@pytest.mark.parametrize(
    ('row', 'options', 'reason'),
    [
        ({'label': 'nope'}, {}, "row 7: label: found 'nope'; expected one of ['yes', 'no', 'maybe']"),
        ({}, {'max_seq_len': 2}, 'row 7: input_text: found 3 tokens; expected at most max_seq_len=2'),
        ({'input_text': ' '}, {}, "row 7: input_text: found no token in ' '"),
        ({'label': 1}, {}, "row 7: label: found 1; expected one of ['yes', 'no', 'maybe']"),
        ({'label': ['no']}, {}, 'row 7: label: found ["no"]; expected one of'),
        ({'label': None}, {}, 'row 7: label: found null; expected one of'),
        ({'input_text': 5}, {}, 'row 7, field input_text: found 5; expected text'),
        ({'input_text': None}, {}, 'row 7, field input_text: is missing'),
        ({'rationale': ['w4', 'w5']}, {}, 'row 7, field rationale: found ["w4", "w5"]; expected text'),
        ({'rationale': float('nan')}, {}, 'row 7, field rationale: found NaN; expected text'),
        ({'rationale': 3}, {}, 'row 7, field rationale: found 3; expected text'),
        ({'answer': 3}, {}, 'row 7, field answer: found 3; expected text'),
        ({}, {'reasoning_targets': 'all'}, "reasoning_targets: found 'all'; expected one of"),
        ({}, {'weights': 'all'}, "weights: found 'all'; expected one of"),
        ({}, {'layout': 'first'}, "layout: found 'first'; expected one of ('reason_first', 'label_first')"),
        ({}, {'rationale_max_tokens': 0}, 'rationale_max_tokens: found 0; expected a number of 1 or more'),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(row, options, reason):
    with pytest.raises(UserError) as error:
        collator(**options)([{**ROW, **row}])
    assert reason in str(error.value) and '\n' not in str(error.value)


def test_a_tokenizer_without_a_pad_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match='no pad token'):
        collator(tokenizer)


@pytest.mark.parametrize(
    ('weights', 'keys'),
    [(None, []), ('reasoning', ['reasoning_weight']), ('both', ['classification_weight', 'reasoning_weight'])],
)
def test_weights_are_emitted_only_where_they_are_asked_for(weights, keys):
    rows = [{**triplet(i), 'weight': weight} for i, weight in enumerate((0.0, 2.5))] + [triplet(2)]
    del rows[2]['weight']
    batch = collator(weights=weights)(rows)
    assert sorted(key for key in batch if 'weight' in key) == keys
    for key in keys:
        assert batch[key].tolist() == [0.0, 2.5, 1.0] and batch[key].dtype == torch.float32


def test_probabilities_stand_beside_labels_and_instead_of_them():
    told = dict(zip(LABELS, (0.5, 0.25, 0.25)))
    rows = [
        {**triplet(0), 'probabilities': told},
        {**triplet(1, 4, None), 'label': '', 'probabilities': told},
        triplet(2),
    ]
    batch = collator()(rows)
    assert batch['labels'].tolist() == [0, NONE, 2]
    assert batch['label_probabilities'].tolist() == [[0.5, 0.25, 0.25]] * 2 + [[0, 0, 0]]
    assert 'label_probabilities' not in collator()(rows[2:])
    turned = TripletCollator(tiny_tokenizer(), LABELS[::-1])(rows)['label_probabilities']
    assert turned[0].tolist() == [0.25, 0.25, 0.5]  # by their names
    with pytest.raises(UserError, match=r'row 0, field probabilities: found those of .*; expected those of yes, no$'):
        TripletCollator(tiny_tokenizer(), LABELS[:2])(rows[:1])


@pytest.mark.parametrize('weight', [-1.0, float('nan'), float('inf'), '2', True])
def test_a_weight_that_makes_no_sense_is_refused(weight):
    with pytest.raises(
        UserError, match=r'^row 7, field weight: found .*; expected a (finite )?number(, zero or more)?$'
    ):
        collator(weights='both')([{**ROW, 'weight': weight}])
    collator()([{**ROW, 'weight': weight}])  # nothing reads it


@pytest.mark.parametrize('cut', [split, split_by_length])
@pytest.mark.parametrize('size', [1, 3, 8, 20])
def test_microbatches_hold_every_row_once(cut, size):
    batch = {**collator()(triplets()), 'row': torch.arange(8)}
    parts = cut(batch, size)
    assert [len(part['labels']) for part in parts] == [min(size, 8 - start) for start in range(0, 8, size)]
    spans = [span for part in parts for span in part.pop('spans')]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = whole['row']
    assert sorted(order.tolist()) == list(range(8))
    assert spans == [batch['spans'][row] for row in order]
    assert all(torch.equal(whole[key], batch[key][order]) for key in whole)
    lengths = whole['attention_mask'].sum(1).tolist()
    assert cut is split or lengths == sorted(lengths)


def test_composer_is_told_samples_and_real_tokens():
    batch = collator()(triplets())
    spec = triplet_data_spec(torch.utils.data.DataLoader([]))
    assert spec.get_num_samples_in_batch(batch) == 8
    assert spec.get_num_tokens_in_batch(batch, 'total') == int(batch['attention_mask'].sum())
    assert spec.get_num_tokens_in_batch(batch, 'loss_generating') == 8
