"""From raw data to shards, by the command's own entry."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from real import COUNTS, CREAK
from streaming import LocalDataset, StreamingDataset

from dhrd_plugin.data.controls import CONTROLS
from dhrd_plugin.data.inspect import inspect_set
from dhrd_plugin.data.prepare import main
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams.cache import machine_lock
from dhrd_plugin.streams.publish import publish


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def shards(folder):
    return {name: data for name, data in files(folder).items() if not name.endswith('triplets.json')}


def summary_of(folder):
    return json.loads((folder / 'triplets.json').read_text())


def write_rows(path, count=4, **change):
    rows = [
        {'idx': i, 'premise': f'p{i}', 'hypothesis': f'h{i}', 'label': 'entailment', 'rationale': f'r{i}'}
        for i in range(count)
    ]
    rows[-1].update(change)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def run(*args):
    return main([str(arg) for arg in args])


@pytest.mark.parametrize('name', COUNTS)
def test_each_folder_gives_the_papers_row_counts(shared, tmp_path, name):
    assert run('--task', name.lower(), '--input', shared / 'superglue' / name, '--output', tmp_path / 'out') == 0
    written = {path.name: len(LocalDataset(str(path))) for path in (tmp_path / 'out').iterdir()}
    assert written == COUNTS[name]


def test_rte_with_its_rationales(shared, tmp_path, capsys):
    rationales = shared / 'rationales' / 'rte_train.jsonl'
    assert (
        run(
            '--task',
            'rte',
            '--input',
            shared / 'superglue' / 'RTE',
            '--split',
            'train',
            '--rationales',
            rationales,
            '--output',
            tmp_path / 'rte',
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert 'joined: 2,490 of 2,490 rationales, 0 match no row' in printed
    assert 'the rationale states the label in 1 rows: 1969' in printed
    summary = summary_of(tmp_path / 'rte')
    assert summary['labels'] == {'entailment': 1249, 'not_entailment': 1241}
    assert summary['states_label'] == {'rows': 1, 'ids': ['1969']}
    assert set(summary['lengths']['sequence']) == {'50%', '95%', '100%'}


def test_creak_by_a_template_alone(shared, tmp_path):
    (tmp_path / 'creak.yaml').write_text(CREAK)
    for split, count in (('train', 10176), ('dev', 1371)):
        out = tmp_path / split
        assert (
            run('--template', tmp_path / 'creak.yaml', '--input', shared / 'creak', '--split', split, '--output', out)
            == 0
        )
        assert summary_of(out)['rows'] == count and summary_of(out)['without_rationale'] == 0


def test_tokens_and_cuts(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({'<pad>': 0, '?': 1}, unk_token='?'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>').save_pretrained(tmp_path / 'tokenizer')
    data = write_rows(tmp_path / 'train.jsonl', premise='long ' * 30, rationale='short')
    data.write_text(data.read_text().replace('"r1"', '"' + 'why ' * 30 + '"'))
    command = ['--task', 'rte', '--input', data, '--output', tmp_path / 'out', '--max-seq-len', 20]
    assert run(*command) == 2
    assert '--max-seq-len: counts tokens; say which with --tokenizer' in capsys.readouterr().err
    assert run(*command, '--tokenizer', tmp_path / 'none') == 2
    assert run(*command, '--tokenizer', tmp_path / 'tokenizer') == 0
    assert 'at 20 tokens: 1 rationales cut, 1 inputs too long' in capsys.readouterr().out
    summary = summary_of(tmp_path / 'out')
    # 10 words of input; then <REASON>, the rationale's words, <ANS>, the answer
    assert summary['lengths']['input'] == {'50%': 10, '95%': 39, '100%': 39}
    assert summary['lengths']['sequence'] == {'50%': 14, '95%': 43, '100%': 43}


@pytest.mark.parametrize('control', CONTROLS[1:])
def test_controls(tmp_path, control):
    data = write_rows(tmp_path / 'train.jsonl')
    assert run('--task', 'rte', '--input', data, '--output', tmp_path / 'out', '--control', control) == 0
    rationales = [row['rationale'] for row in LocalDataset(str(tmp_path / 'out'))]
    if control == 'OnlyLabel':
        assert rationales == [''] * 4
    elif control == 'ShuffleTokens':
        assert rationales == [f'r{index}' for index in range(4)]  # of one word
    else:
        assert all(rationale != f'r{index}' for index, rationale in enumerate(rationales))
    assert summary_of(tmp_path / 'out')['control'] == control


def test_unlabelled_rows_where_they_are_asked_for(tmp_path, capsys):
    data = write_rows(tmp_path / 'a.jsonl', label=None)
    command = ['--task', 'rte', '--input', data, '--output', tmp_path / 'out']
    assert run(*command) == 2
    assert 'line 4, field label: is missing' in capsys.readouterr().err
    assert run(*command, '--unlabelled') == 0
    assert summary_of(tmp_path / 'out')['labels'] == {'entailment': 3, 'not_entailment': 0, '': 1}


def test_compression_and_hashes(tmp_path):
    data = write_rows(tmp_path / 'train.jsonl')
    assert (
        run(
            '--task',
            'rte',
            '--input',
            data,
            '--output',
            tmp_path / 'out',
            '--compression',
            'zstd:3',
            '--hashes',
            'xxh128',
        )
        == 0
    )
    (entry,) = json.loads((tmp_path / 'out' / 'index.json').read_text())['shards']
    assert entry['compression'] == 'zstd:3' and list(entry['zip_data']['hashes']) == ['xxh128']
    assert inspect_set(tmp_path / 'out').rows == 4


def test_any_number_of_workers_writes_the_same_bytes(shared, tmp_path):
    for workers in (1, 3):
        assert (
            run(
                '--task',
                'rte',
                '--input',
                shared / 'superglue' / 'RTE',
                '--split',
                'train',
                '--workers',
                workers,
                '--shard-size',
                50_000,
                '--output',
                tmp_path / str(workers),
            )
            == 0
        )
    assert len(shards(tmp_path / '1')) > 10
    assert shards(tmp_path / '1') == shards(tmp_path / '3')
    summaries = [summary_of(tmp_path / workers) | {'seconds': 0} for workers in '13']
    assert summaries[0] == summaries[1]


# ------------------------------------------------------------------------------------------------
# Bad rows and bad arguments


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'premise': None}, 'field premise: is missing'),
        ({'label': 'maybe'}, 'field label: found "maybe"; expected one of "entailment", "not_entailment"'),
        ({'label': True}, 'field label: found true; expected one of'),
        ({'premise': 7}, 'field premise: found 7; expected text'),
        ({'premise': ''}, 'field premise: is empty'),
        ({'premise': 'x' * 5_000_000}, 'the row is longer than 1,048,576 bytes'),
        ({'idx': 0}, "field id: found '0' twice, first in"),
    ],
)
def test_a_bad_row_stops_it_or_is_set_aside(tmp_path, capsys, change, message):
    folder = tmp_path / 'data'
    folder.mkdir()
    write_rows(folder / 'train.jsonl')
    data = write_rows(folder / 'val.jsonl', **change)
    command = ['--task', 'rte', '--input', folder, '--output', tmp_path / 'out']
    assert run(*command) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f'error: {data}, line 4') and message in printed.err
    assert printed.err.count('\n') == 1 and printed.out == ''
    assert os.listdir(tmp_path) == ['data']  # nothing of the good split either

    assert run(*command, '--skip-bad', tmp_path / 'bad.jsonl') == 0
    assert 'set aside: 1 bad rows, in' in capsys.readouterr().out
    (bad,) = [json.loads(line) for line in (tmp_path / 'bad.jsonl').read_text().splitlines()]
    assert bad['where'] == f'{data}, line 4' and message.split(': ', 1)[-1] in bad['reason'] and bad['row']
    assert len(LocalDataset(str(tmp_path / 'out' / 'validation'))) == 3
    assert summary_of(tmp_path / 'out' / 'validation')['set_aside'] == 1
    assert summary_of(tmp_path / 'out' / 'train')['set_aside'] == 0


def test_bytes_that_are_no_rows(tmp_path, capsys):
    data = write_rows(tmp_path / 'train.jsonl')
    data.write_bytes(data.read_bytes() + b'{"premise": "\xff"}\n{"idx": 9, "premise": "It ra')
    command = ['--task', 'rte', '--input', data, '--output', tmp_path / 'out']
    assert run(*command) == 2
    assert 'line 5, field premise: is not valid UTF-8' in capsys.readouterr().err
    assert run(*command, '--skip-bad', tmp_path / 'bad.jsonl') == 0
    reasons = [json.loads(line)['reason'] for line in (tmp_path / 'bad.jsonl').read_text().splitlines()]
    assert len(reasons) == 2 and 'the file breaks off in this row' in reasons[1]


def test_a_rationale_that_matches_nothing(tmp_path, capsys):
    data = write_rows(tmp_path / 'train.jsonl', rationale=None)
    rationales = tmp_path / 'r.jsonl'
    rationales.write_text('{"idx": 3, "rationale": "why"}\n{"idx": 77, "rationale": "what"}\n')
    command = ['--task', 'rte', '--input', data, '--rationales', rationales, '--output', tmp_path / 'out']
    assert run(*command) == 2
    assert f"error: {rationales}, line 2, field idx: '77' matches no row" in capsys.readouterr().err
    assert run(*command, '--skip-bad', tmp_path / 'bad.jsonl') == 0
    assert 'joined: 1 of 2 rationales, 1 match no row' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--task', 'rt'], "unknown task 'rt'; did you mean 'rte'"),
        (['--template', 'none.yaml'], 'none.yaml: No such file or directory'),
        (['--task', 'rte', '--input', 'nowhere'], 'nowhere: no such file or folder'),
        (['--task', 'rte', '--split', 'train'], 'is one file; leave out the split'),
        (['--task', 'rte', '--compression', 'zip'], "compression: unknown 'zip'"),
        (['--task', 'rte', '--workers', '0'], "argument --workers: found '0'; expected a whole number from 1"),
        (['--task', 'rte', '--control', 'none'], "argument --control: invalid choice: 'none'"),
        (['--task', 'rte', '--hashes', 'md4x'], "hashes: unknown 'md4x'"),
        (['--task', 'rte', '--output', 'full'], 'full: already holds a shard set'),
        (['--task', 'rte', '--output', '/proc/none/out'], '--output: /proc/none/out: cannot be written: No such file'),
        (['--task', 'rte', '--skip-bad', '/proc/none/bad'], '--skip-bad: /proc/none/bad: cannot be written: No such'),
        (['--task', 'rte', '--output', 'other'], 'other: exists and is not a shard set'),
    ],
)
def test_bad_arguments(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / 'a.jsonl')
    write_triplets([{'id': '0', 'input_text': 'x', 'label': 'y'}], 'full')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.tex').touch()
    assert run('--input', 'a.jsonl', '--output', 'out', *args) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_rationales_belong_to_one_split(tmp_path, capsys):
    write_rows(tmp_path / 'train.jsonl')
    for more in (['--rationales', tmp_path / 'train.jsonl'], ['--control', 'OnlyLabel']):
        assert run('--task', 'rte', '--input', tmp_path, '--output', tmp_path / 'out', *more) == 2
        assert 'name it with --split' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Old set or new set


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_the_old_set(root, tmp_path, sent):
    data = write_rows(tmp_path / 'train.jsonl', 20_000)
    out = tmp_path / 'out'
    write_triplets([{'id': '0', 'input_text': 'x', 'label': 'entailment'}], out)
    before = files(out)
    command = [
        sys.executable,
        root / 'scripts' / 'prepare_data.py',
        '--task',
        'rte',
        '--input',
        data,
        '--output',
        out,
        '--overwrite',
        '--shard-size',
        '100',
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not any('shard.00005' in str(path) for path in tmp_path.glob('.out.*/*')):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=120)
    assert files(out) == before
    if sent == signal.SIGTERM:
        assert process.returncode == 130 and errors.startswith('stopped') and 'Traceback' not in errors
        assert sorted(os.listdir(tmp_path)) == ['out', 'train.jsonl']


# ------------------------------------------------------------------------------------------------
# Object storage


def read_remote(remote, local):
    options = {'batch_size': 1, 'shuffle': False, 'validate_hash': 'sha1'}
    with machine_lock():
        data = StreamingDataset(remote=remote, local=str(local), **options)
    return list(data)


def test_written_to_s3_and_read_from_there(s3, tmp_path, capsys):
    folder = tmp_path / 'data'
    folder.mkdir()
    data = write_rows(folder / 'train.jsonl')
    write_rows(folder / 'test.jsonl')
    remote = f'{s3.bucket}/rte'
    command = ['--task', 'rte', '--input', folder, '--output', remote]
    assert run(*command) == 0
    assert sorted(os.listdir(s3.folder / 'rte')) == ['test', 'train']
    assert [row['rationale'] for row in read_remote(f'{remote}/train', tmp_path / 'one')] == ['r0', 'r1', 'r2', 'r3']
    assert inspect_set(f'{remote}/train').rows == 4
    assert summary_of(s3.folder / 'rte' / 'train')['rows'] == 4

    assert run(*command) == 2
    assert f'error: --output: {remote}/train: already holds a shard set' in capsys.readouterr().err
    data.write_text(data.read_text().replace('r2', 'new'))
    assert run(*command, '--overwrite') == 0
    assert [row['rationale'] for row in read_remote(f'{remote}/train', tmp_path / 'two')] == ['r0', 'r1', 'new', 'r3']

    index = s3.folder / 'rte' / 'train' / 'index.json'
    index.write_text('{"page": 1}')
    assert run(*command, '--overwrite') == 2
    assert f'error: --output: {remote}/train: holds an index.json of something else' in capsys.readouterr().err
    assert index.read_text() == '{"page": 1}'


@pytest.mark.parametrize('last', ['index.json', '.mds'])
def test_an_upload_that_breaks_off_leaves_the_old_set(s3, tmp_path, monkeypatch, last):
    from streaming.base.storage.upload import S3Uploader

    def rows(text):
        return [{'id': str(i), 'input_text': f'{text} {i}', 'label': text} for i in range(9)]

    remote, upload = f'{s3.bucket}/broken{last}', S3Uploader.upload_file
    summary = s3.folder / f'broken{last}' / 'triplets.json'
    write_triplets(rows('old'), remote, size_limit=10)
    before = summary.read_bytes()

    def break_off(self, name):
        if name.endswith(last):
            time.sleep(0.2)  # the others may go on
            raise ConnectionError('gone')
        upload(self, name)

    monkeypatch.setattr(S3Uploader, 'upload_file', break_off)
    with pytest.raises(UserError, match=r's3://bucket/broken.*: cannot be written: ConnectionError: gone'):
        write_triplets(rows('new'), remote, size_limit=10, overwrite=True)
    assert [row['input_text'] for row in read_remote(remote, tmp_path / 'local')] == [f'old {i}' for i in range(9)]
    if last != 'index.json':  # which is the last but for the index
        assert summary.read_bytes() == before
    monkeypatch.undo()


def test_a_bucket_or_server_that_is_not_there(s3, tmp_path, capsys, monkeypatch):
    data = write_rows(tmp_path / 'train.jsonl')
    command = ['--task', 'rte', '--input', data, '--output']
    assert run(*command, 's3://nobody/rte') == 2
    assert 'error: s3://nobody/rte' in capsys.readouterr().err
    monkeypatch.setenv('S3_ENDPOINT_URL', 'http://127.0.0.1:9')
    assert run(*command, f'{s3.bucket}/rte') == 2
    error = capsys.readouterr().err
    assert error.startswith('error: s3://bucket/rte') and 'http://127.0.0.1:9' in error and error.count('\n') == 1


def test_publishing_replaces_in_one_step(tmp_path):
    for name in ('.new.tmp', 'out'):
        write_triplets([{'id': name, 'input_text': 'x', 'label': 'y'}], tmp_path / name)
    publish(tmp_path / '.new.tmp', tmp_path / 'out')
    assert [row['id'] for row in LocalDataset(str(tmp_path / 'out'))] == ['.new.tmp']
    assert os.listdir(tmp_path) == ['out']


def test_what_stands_beside_a_set_is_never_removed(tmp_path):
    """Not even where it came after the look at the start."""
    for name in ('.new.tmp', 'out'):
        write_triplets([{'id': name, 'input_text': 'x', 'label': 'y'}], tmp_path / name)
    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    before = files(tmp_path)
    with pytest.raises(UserError, match=r'out: holds notes\.txt, which is no part of'):
        publish(tmp_path / '.new.tmp', tmp_path / 'out')
    assert files(tmp_path) == before


@pytest.mark.parametrize('more', [(), ('--overwrite',)])
@pytest.mark.parametrize('prefix', ['exp#1/train', 'exp?1/train', 'exp\t1/train'])
def test_an_address_that_would_be_cut_off_writes_nothing(s3, tmp_path, capsys, prefix, more):
    """The provider's client drops what follows: each file would overwrite the last, under another name."""
    data = write_rows(tmp_path / 'train.jsonl')
    before = files(s3.folder)
    assert run('--task', 'rte', '--input', data, '--output', f'{s3.bucket}/{prefix}', *more) == 2
    printed = capsys.readouterr()
    assert 'which cuts an address off' in printed.err and printed.err.count('\n') == 1 and not printed.out
    assert files(s3.folder) == before


def test_an_earlier_report_of_bad_rows_may_be_replaced(tmp_path):
    data = write_rows(tmp_path / 'train.jsonl', premise=None)
    bad = tmp_path / 'bad.jsonl'
    command = ['--task', 'rte', '--input', data, '--output', tmp_path / 'out', '--overwrite', '--skip-bad', bad]
    bad.touch()
    for _ in range(2):
        assert run(*command) == 0
        assert json.loads(bad.read_text())['where'] == f'{data}, line 4'
