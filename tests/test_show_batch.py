"""The controls and the layouts, as the model sees them."""

import json
import re

import pytest

from dhrd_plugin.show_batch import main


def shown(root, capsys, *overrides):
    assert main([str(root / 'yamls' / 'rte.yaml'), '--rows', '3', *overrides]) == 0
    return re.split(r'\nrow ', re.sub(r'(?<=\S)\n(?=\S)', ' ', capsys.readouterr().out))[1:]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv('COLUMNS', '2000')


OWN = 'Drying the plates is given as Hugo'
ANSWER = re.compile(r'<ANS> (\w+)')


@pytest.mark.parametrize(
    ('control', 'own_rationale', 'has_reason'),
    [
        ('ConsistentReasoningLabel', True, True),
        ('OnlyLabel', False, False),
        ('ShuffleReasoning', False, True),
        ('ShuffleReasoningLabel', False, True),
        ('ShuffleTokens', False, True),
    ],
)
def test_a_control_gives_the_sequence_that_its_name_promises(root, capsys, wide, control, own_rationale, has_reason):
    paper = ('train_loader.layout=reason_first', 'markers.answer=<ANS>')
    first, *_ = shown(root, capsys, f'train_loader.control={control}', *paper)
    assert 'Hugo dried the plates after dinner.' in first
    assert 'entail the hypothesis[?]' in first
    assert (OWN in first) == own_rationale
    assert ('<REASON>' in first) == has_reason
    if control != 'ShuffleReasoningLabel':
        assert ANSWER.findall(first) == ['Yes']
    if control == 'ShuffleTokens':
        assert set(OWN.split()[:-1]) < set(re.split(r'\s+', first.split('<REASON>')[1]))


def test_the_label_stands_first_where_the_layout_says_so(root, capsys, wide):
    overrides = ['train_loader.layout=label_first', 'train_loader.rationale_max_tokens=5', "markers.answer=''"]
    first, *_ = shown(root, capsys, *overrides)
    assert re.search(rf'entail the hypothesis\[\?\] Yes <REASON> {OWN[:12]}', first)
    assert int(re.findall(r'(\d+) cut', first)[0]) > 0


def test_the_pooled_baseline_reads_no_rationale(root, capsys, wide):
    first, *_ = shown(root, capsys, 'algorithms.auxiliary_reasoning_loss=null')
    assert 'entail the hypothesis[?]' in first and ' 0 supervised' in first
    assert OWN not in first and '<REASON>' not in first


def test_it_says_what_is_pooled_supervised_and_cut(root, capsys, wide):
    first, *_ = shown(root, capsys, 'max_seq_len=70', 'model.reasoning_targets=rationale')
    tokens, pooled, supervised, cut = map(
        int, re.findall(r'(\d+) tokens.*number (\d+) pooled, (\d+) supervised, (\d+) cut', first)[0]
    )
    assert tokens == 70 and cut > 0
    assert pooled < 70 - supervised


def test_of_several_rationales_one_is_drawn(root, tmp_path, capsys, wide):
    row = {'idx': 0, 'premise': 'p', 'hypothesis': 'h', 'label': 'entailment', 'rationale': ['one reason', 'one more']}
    (tmp_path / 'rows.jsonl').write_text(json.dumps(row))
    own = (f'train_loader.source={tmp_path}/rows.jsonl', f'train_loader.cache_dir={tmp_path}/cache')
    (first,) = shown(root, capsys, *own)
    assert ('one reason' in first) != ('one more' in first) and '[' not in first.split('<REASON>')[1]
