"""Triplets out of real MDS shards."""

from collections import Counter

import pytest
from streaming import MDSWriter
from tiny import LABELS, tiny_tokenizer, triplet, triplets
from torch.utils.data import DataLoader, Dataset

from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams.dataset import StreamingTripletDataset, draw_rationale
from dhrd_plugin.streams.rows import StreamRows
from dhrd_plugin.streams.stream import TripletStream

MANY = [f'w{i}' for i in range(5)]


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    """Two dozen rows in several shards; row 0 has five rationales."""
    rows = triplets(24)
    rows[0]['rationale'] = MANY
    folder = tmp_path_factory.mktemp('mds') / 'train'
    write_triplets(rows, folder, size_limit=200)
    assert len(list(folder.glob('shard.*.mds'))) > 2
    return folder, rows


def stream(folder, **options):
    return StreamingTripletDataset(local=str(folder), batch_size=4, num_canonical_nodes=1, **options)


@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_every_row_is_read_once_and_whole(shards, shuffle, workers):
    folder, rows = shards
    loader = DataLoader(stream(folder, shuffle=shuffle), batch_size=4, num_workers=workers, collate_fn=list)
    found = [row for batch in loader for row in batch]
    assert Counter(row['id'] for row in found) == Counter(row['id'] for row in rows)
    wanted = {row['id']: row for row in rows}
    for row in found:
        drawn = row['rationale'] in MANY if row['id'] == '0' else row['rationale'] == wanted[row['id']]['rationale']
        assert drawn
        assert {**row, 'rationale': None} == {**wanted[row['id']], 'rationale': None}


def test_from_a_remote_into_the_collator(shards, tmp_path):
    folder, rows = shards
    data = StreamingTripletDataset(remote=str(folder), local=str(tmp_path / 'local'), batch_size=4)
    batches = list(DataLoader(data, batch_size=4, collate_fn=TripletCollator(tiny_tokenizer(), LABELS)))
    assert sum(len(batch['labels']) for batch in batches) == len(rows)
    assert all('reasoning_labels' in batch for batch in batches)


def test_map_style_holds_each_row_at_its_index(shards):
    folder, rows = shards
    mapped = StreamRows([TripletStream(local=str(folder))])
    assert isinstance(mapped, Dataset) and len(mapped) == stream(folder).num_samples == 24
    for data in (mapped, stream(folder)):
        assert [data[i]['id'] for i in range(24)] == [row['id'] for row in rows]
    batches = DataLoader(mapped, batch_size=5, num_workers=2, collate_fn=list)
    assert [row['id'] for batch in batches for row in batch] == [row['id'] for row in rows]


def drawn_by_epoch(folder, epochs, **options):
    data = stream(folder, **options)
    return [next(row['rationale'] for row in data if row['id'] == '0') for _ in range(epochs)]


def epochs_through_workers(folder, epochs):
    loader = DataLoader(stream(folder), batch_size=4, num_workers=1, persistent_workers=True, collate_fn=list)
    read = [[row for batch in loader for row in batch] for _ in range(epochs)]
    return [next(row['rationale'] for row in rows if row['id'] == '0') for rows in read]


def test_several_rationales_are_drawn_by_epoch(shards):
    folder, _ = shards
    first = drawn_by_epoch(folder, 6)
    assert len(set(first)) > 1
    assert first == [draw_rationale(MANY, '0', epoch, 0) for epoch in range(6)]
    assert drawn_by_epoch(folder, 6, shuffle=True) == first  # the order of the rows does not matter
    assert drawn_by_epoch(folder, 6, rationale_seed=1) != first
    assert epochs_through_workers(folder, 3) == first[:3]


def test_a_resumed_epoch_draws_what_it_would_have_drawn(shards):
    folder, _ = shards
    data = stream(folder)
    rows = iter(data)
    read = [next(rows) for _ in range(8)]
    state = data.state_dict(len(read), from_beginning=True)
    expected = read + list(rows)
    del rows, data
    resumed = stream(folder)
    resumed.load_state_dict(state)
    assert list(resumed) == expected[8:]


def test_the_draw_is_even_and_leaves_single_rationales_alone():
    counts = Counter(draw_rationale(MANY, str(row), epoch, 3) for row in range(40) for epoch in range(25))
    assert set(counts) == set(MANY) and min(counts.values()) > 150
    assert [draw_rationale(value, '0', 0, 0) for value in ('text', '', None, [])] == ['text', '', None, None]


def test_shards_without_a_column_of_a_triplet_are_refused(tmp_path):
    with MDSWriter(out=str(tmp_path), columns={'id': 'str', 'text': 'str', 'label': 'str'}) as writer:
        writer.write({'id': '0', 'text': 'w1', 'label': 'yes'})
    with pytest.raises(UserError) as error:
        stream(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: found columns ['id', 'label', 'text']; expected triplets, with a column 'input_text'"
    )


def test_a_triplet_keeps_its_fields_through_the_shards(tmp_path):
    row = {**triplet(3), 'rationale': '', 'weight': 0.5, 'group': 'g', 'answer': 'maybe'}
    write_triplets([row], tmp_path / 'one')
    assert stream(tmp_path / 'one')[0] == row
