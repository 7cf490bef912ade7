"""The four controls of Table 2, as the model sees them."""

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
    ],
)
def test_a_control_gives_the_sequence_that_its_name_promises(
    root, capsys, wide, control, own_rationale, has_reason
):
    first, *_ = shown(root, capsys, f'train_loader.control={control}')
    assert 'Hugo dried the plates after dinner.' in first
    assert 'entail the hypothesis[?]' in first
    assert (OWN in first) == own_rationale
    assert ('<REASON>' in first) == has_reason
    if control != 'ShuffleReasoningLabel':
        assert ANSWER.findall(first) == ['Yes']


def test_it_says_what_is_pooled_supervised_and_cut(root, capsys, wide):
    first, *_ = shown(root, capsys, 'max_seq_len=70', 'model.reasoning_targets=rationale')
    tokens, pooled, supervised, cut = map(
        int, re.findall(r'(\d+) tokens.*number (\d+) pooled, (\d+) supervised, (\d+) cut', first)[0]
    )
    assert tokens == 70 and cut > 0
    assert pooled < 70 - supervised
