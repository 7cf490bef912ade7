"""All ways to ask one export give the labels that the network gives, and chain of thought is read to its end."""

import json
from types import SimpleNamespace

import pytest
import torch
from benchmarks import infer
from benchmarks import main as benchmark
from benchmarks.table import make_row
from configs import TASK
from reference import row_losses
from tiny import LABELS, VOCAB, tiny_lm, tiny_tokenizer, triplets

from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.models.network import DualHeadNetwork

pytestmark = pytest.mark.usefixtures('one_thread')

ROWS = triplets(12)
TEXTS = [row['input_text'] for row in ROWS]


def labels_of(network):
    """Row by row, in plain arithmetic."""

    def loss(row, label):
        return float(row_losses(network, {**row, 'label': label, 'rationale': None}, VOCAB, LABELS)[0])

    return [min(LABELS, key=lambda label: loss(row, label)) for row in ROWS]


WAYS = [infer.OURS, infer.TORCH, infer.INT8, infer.PIPELINE]


@pytest.mark.parametrize(('head', 'ways'), [('linear', [*WAYS, infer.STOCK]), ('mlp', WAYS)])
def test_all_ways_give_the_labels_of_the_network(head, ways, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, 'BATCH', 5)
    lm, task = tiny_lm('llama', tied=True), load_task(TASK)
    asks = infer.contenders(infer.write_export(lm, tiny_tokenizer(), task, head, tmp_path / head), head)
    torch.manual_seed(0)
    expected = labels_of(DualHeadNetwork(lm, len(LABELS), head))
    assert len(set(expected)) > 1
    found = {name: ask(TEXTS) for name, ask in asks.items()}
    assert found == {**dict.fromkeys(ways, expected), infer.INT8: found[infer.INT8]}
    assert sum(a == b for a, b in zip(found[infer.INT8], expected)) > len(expected) // 2


def test_a_label_that_differs_shows():
    asks = {infer.OURS: lambda texts: ['yes'] * len(texts), infer.PIPELINE: lambda texts: ['yes', 'no', 'yes', 'yes']}
    same = next(row for row in infer.throughput_rows(asks, TEXTS[:4], 1, 'made') if row['what'].startswith('same'))
    assert (same['median'], same['met']) == (0.75, False)


def test_chain_of_thought_ends_with_its_end_of_text():
    lm, tokenizer, task = tiny_lm('llama'), tiny_tokenizer(), load_task(TASK)
    lm.generation_config.eos_token_id = None
    whole = infer.decode(lm, tokenizer, TEXTS, task, 9)
    assert [len(ids) for ids in whole] == [9] * len(TEXTS)
    lm.generation_config.eos_token_id = end = whole[0][3]
    cut = infer.decode(lm, tokenizer, TEXTS, task, 9)
    assert cut[0] == whole[0][: whole[0].index(end) + 1]
    assert all(end not in ids[:-1] and (len(ids) == 9 or ids[-1] == end) for ids in cut)
    assert tokenizer.padding_side == tiny_tokenizer().padding_side


def test_what_was_written_is_described():
    lm, tokenizer = tiny_lm('llama'), tiny_tokenizer()
    read = len(tokenizer(TEXTS[0])['input_ids'])
    text = infer.describe_reasoning(lm, tokenizer, TEXTS[:1], [[5] * 4])
    assert text.startswith('4 tokens written on average, 4 at most; 0 of 1 wrote the sentinel')
    backbone = sum(weight.numel() for weight in lm.model.parameters()) - lm.model.embed_tokens.weight.numel()
    work = ((read + 4) * backbone + 4 * lm.lm_head.weight.numel()) / (read * backbone)
    assert f'at least {work:.0f} times' in text


def test_the_verb_measures_every_bar(model_folder, tmp_path, monkeypatch):
    out = tmp_path / 'report.json'
    monkeypatch.setattr(infer, 'load_rows', lambda count, split: (load_task(TASK), ROWS[:count], f'made {split}'))
    row = make_row('import dhrd_plugin', [1.0], 's', [1.0], 'import composer', at_most=1.05)
    monkeypatch.setattr(infer, 'import_row', lambda repetitions: row)  # takes a minute
    command = ['infer', '--model', str(model_folder), '--rows', '8', '--repetitions', '1', '--new-tokens', '4']
    assert benchmark.main([*command, '--output', str(out)]) == 0
    report = json.loads(out.read_text())
    rows = [SimpleNamespace(**{'bar': None, 'against': None, **row}) for row in report['rows']]
    same = [row for row in rows if row.what.startswith('same labels')]
    assert len(same) == 7
    assert all(row.median == 1.0 and row.met for row in same if infer.INT8 not in row.what)
    bars = [(row.bar, row.against) for row in rows]
    counted = [('>= 4.5', infer.PIPELINE), ('>= 7', infer.PIPELINE), ('>= 142', 'chain of thought')]
    assert [bars.count(bar) for bar in counted] == [2, 2, 2] and ('<= 0.6', infer.PIPELINE) in bars
    assert ('<= 1.05', 'import composer') in bars
    assert {row.what for row in rows} >= {'one text, dhrd predict, p50', 'one text, dhrd predict, p95'}
