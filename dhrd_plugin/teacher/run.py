"""``dhrd rationales``: ask a teacher for the rationales of a data set (paper, appendix E.3).

A language model behind any OpenAI-compatible endpoint is given a row and its gold label and explains step
by step why the label is right, without stating it. With ``--votes N --blind`` it is asked N times without the label,
and the shares of its answers are the row's probabilities (ours, not the paper's). Rationales go to a JSONL file, one
whole line at a time, that a second start continues, and that ``rationales:`` of a training config and
``--rationales`` of ``dhrd prepare`` join on ``idx``.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from dhrd_plugin import files
from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.data.labels import with_labels
from dhrd_plugin.data.leaks import restated
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.triplet import Triplet, classes_of, fingerprint, words_of
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.errors import UserError, tell, user_errors
from dhrd_plugin.teacher.endpoint import Endpoint, Unanswered, find_key
from dhrd_plugin.teacher.log import RowLog, is_open, known, read_log, rejected
from dhrd_plugin.teacher.prompt import (
    build_prompt,
    check_answer,
    kinds,
    no_label,
    read_label,
    read_prompt,
    split_answer,
)


@dataclass
class Run:
    """One run: rows in, rationales out.

    A row that the endpoint did not answer at all is marked ``unanswered`` in ``rejects``: the next start asks
    it again.
    """

    endpoint: Endpoint
    template: str
    answers: Mapping[str, str]  # the answer text of each label
    attempts: int  # how often a row is asked at most, until an answer can be used
    output: RowLog  # the rationales
    rejects: RowLog  # the rows without one, with the reason
    tokens: Counter[str] = field(default_factory=Counter)  # in, out, and the number of answers uncounted
    signal: int = 0  # the one that ended the run
    silent: int = 0  # consecutive rows without any answer
    votes: int = 0  # of each row; 0: the prompt shows the label
    explained: Counter[str] = field(default_factory=Counter)  # rationales of votes: kept, or dropped by the reason

    async def ask_all(self, rows: Iterator[Triplet], concurrency: int, on_row: Callable[[], None]) -> None:
        """Ask for every row, ``concurrency`` at a time; the next one is read when one is done."""

        async def worker() -> None:
            for triplet in rows:
                await self.ask_row(triplet)
                on_row()
                # All requests in flight can fail together, and a few odd rows in turn; more is the endpoint's fault.
                if self.silent >= max(3, concurrency):
                    last = list(self.rejects.rows.values())[-1]['reason']
                    raise UserError(f'{self.endpoint.address}: {self.silent} rows got no answer: {last}')
                if self.signal:
                    return

        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(worker()) for _ in range(concurrency)]
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self.stop, signum, tasks)
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if not self.signal:
                raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.endpoint.client.close()

    def stop(self, signum: int, tasks: Sequence[asyncio.Task[None]]) -> None:
        """End the run: Ctrl-C waits for the requests in flight; SIGTERM or a second Ctrl-C drops them."""
        if self.signal or signum == signal.SIGTERM:
            for task in tasks:
                task.cancel()
        else:
            tell('stopping: waiting for the answers in flight; Ctrl-C again drops them')
        self.signal = signum

    async def ask_row(self, triplet: Triplet) -> None:
        """Ask for one row, as often as it has votes, and write the outcome; whatever ends it, no vote is lost."""
        begun = self.begun(triplet)
        votes: list[str | None] = list(begun.get('votes_so_far', ()))  # None: an answer that counts for no label
        used = Counter({key: begun.get(key, 0) for key in ('attempts', 'prompt_tokens', 'completion_tokens')})
        wanted, text, reason, missing = max(1, self.votes), None, None, 'stopped'
        try:
            while len(votes) < wanted and not self.signal:
                text, reason, stopped = await self.ask_until_usable(triplet, used)
                if stopped:
                    break
                if text is None:
                    missing, self.silent = reason, self.silent + 1
                    break
                votes.append(text if reason is None else None)
                self.silent = 0
        finally:
            made = {'model': self.endpoint.model, **used, 'input': fingerprint(triplet, self.votes)}
            usable = [vote for vote in votes if vote is not None]
            if len(votes) < wanted:
                if votes or missing != 'stopped':  # else there is nothing to keep
                    reject = {'idx': triplet['id'], 'reason': missing, 'unanswered': True, 'answer': None}
                    self.rejects.append({**reject, **made, **({'votes_so_far': votes} if votes else {})})
            elif usable:
                self.output.append({'idx': triplet['id'], **self.outcome(triplet, usable), **made})
            else:
                reject = {'idx': triplet['id'], 'reason': reason, 'unanswered': False, 'answer': text}
                self.rejects.append({**reject, **made})

    def begun(self, triplet: Triplet) -> Mapping[str, Any]:
        """What an earlier start kept of a row's votes by this model; empty without any."""
        row = self.rejects.rows.get(triplet['id'], {})
        same = row.get('model') == self.endpoint.model and row.get('input') == fingerprint(triplet, self.votes)
        return row if same and row.get('votes_so_far') else {}

    def outcome(self, triplet: Triplet, texts: Sequence[str]) -> dict[str, Any]:
        """The rationale; of blind votes, the shares of the labels, and the rationales that end in the row's own."""
        if not self.votes:
            return {'rationale': split_answer(texts[0])[0]}
        votes, kept = dict.fromkeys(self.answers, 0), list[str]()
        for explanation, answer in map(split_answer, texts):
            label = read_label(answer, self.answers) or ''
            votes[label] += 1
            if label != triplet['label']:
                self.explained['another answer' if triplet['label'] else 'no label'] += 1
            elif restated(explanation, (triplet['answer'], label)):
                self.explained['states the label'] += 1
            else:
                self.explained['kept'] += 1
                kept.append(explanation)
        shares = {label: count / len(texts) for label, count in votes.items()}
        told = {'votes': len(texts), 'asked': self.votes}
        return {'rationale': list(dict.fromkeys(kept)) or None, 'probabilities': shares, **told}

    async def ask_until_usable(self, triplet: Triplet, used: Counter[str]) -> tuple[str | None, str | None, bool]:
        """The last answer and why it cannot be used, as :meth:`ask_once`; whether a signal ended the attempts."""
        attempt, again, text, reason = 0, True, None, None
        while again and attempt < self.attempts and not (attempt and self.signal):
            attempt += 1
            text, reason, again = await self.ask_once(triplet, used)
        used['attempts'] += attempt
        return text, reason, again and attempt < self.attempts

    async def ask_once(self, triplet: Triplet, used: Counter[str]) -> tuple[str | None, str | None, bool]:
        """The answer, ``None`` if none came; why it cannot be used, ``None`` if it can; whether to ask again."""
        own = classes_of(triplet)
        others = [pair for pair in self.answers.items() if pair[0] not in own]
        try:
            reply = await self.endpoint.ask(build_prompt(triplet, self.template))
        except Unanswered as error:
            return None, str(error), error.again
        tokens_in, tokens_out = reply.prompt_tokens or 0, reply.completion_tokens or 0
        used.update(prompt_tokens=tokens_in, completion_tokens=tokens_out)
        self.tokens.update({'in': tokens_in, 'out': tokens_out}, uncounted=reply.completion_tokens is None)
        if self.votes:
            reason = check_answer(reply.text, reply.finish_reason, ())
            answer = split_answer(reply.text)[1]
            if reason is None and read_label(answer, self.answers) is None:
                reason = no_label(answer)
        else:
            reason = check_answer(reply.text, reply.finish_reason, own_words(triplet, others), sum(others, ()))
        return reply.text, reason, reason is not None


def own_words(triplet: Triplet, others: Sequence[tuple[str, str]]) -> list[str]:
    """What may stand for a row's label: its answer and name, but no name that the prompt shows as another's answer."""
    shown = {answer for _, answer in others}
    return [word for word in words_of(triplet) if word not in shown]


def dry_run(rows: Iterable[Triplet], template: str, args: argparse.Namespace) -> None:
    """Print the first three prompts and an estimate of the tokens for all rows."""
    asked = characters = 0
    for triplet in rows:
        prompt = build_prompt(triplet, template)
        asked, characters = asked + 1, characters + len(prompt)
        if asked <= 3:
            print(f'--- idx {triplet["id"]}\n{prompt}')
    times = max(1, args.votes)
    limits = [args.body.get(key) for key in ('max_tokens', 'max_completion_tokens')]
    most = max((limit for limit in limits if isinstance(limit, int)), default=0)
    tokens = {'in': times * characters // 4, 'out': times * asked * most}
    out = f'at most {tokens["out"]:,} out' if most else 'out without a limit, which are not counted'
    each = f', {times:,} times each' if args.votes else ''
    print(
        f'--- {asked:,} rows to ask{each}: about {tokens["in"]:,} tokens in (4 characters each), {out}'
        f'{cost(tokens, args)}; more where rows are asked again. Nothing was sent.'
    )


def cost(tokens: Mapping[str, int], args: argparse.Namespace) -> str:
    """The price of tokens as ``, cost 1.2345``; empty where no price was given."""
    if args.price_in is None and args.price_out is None:
        return ''
    price = tokens['in'] * (args.price_in or 0) + tokens['out'] * (args.price_out or 0)
    return f', cost {price / 1e6:,.4f}'


def summarise(work: Run, total: int, before: int, args: argparse.Namespace) -> int:
    """Print where the run stands, and return how many rows the endpoint left unanswered.

    The input has ``total`` rows; ``before`` the run there were so many rationales.
    """
    output, rejects = work.output, work.rejects
    what = 'rows of votes' if work.votes else 'rationales'
    print(
        f'{output.path}: {len(output.rows):,} {what}, {len(output.rows) - before:,} of them new; '
        f'the input has {total:,} rows'
    )
    if work.votes:
        dropped = {reason: count for reason, count in work.explained.items() if reason != 'kept'}
        reasons = ', '.join(f'{reason} {count:,}' for reason, count in dropped.items())
        print(
            f'{work.explained["kept"]:,} of the new {work.explained.total():,} rationales kept, '
            f'{sum(dropped.values()):,} dropped{reasons and f" ({reasons})"}'
        )
    left = {idx: row for idx, row in rejects.rows.items() if idx not in output.rows}
    aside = [row['reason'] for row in left.values() if not row['unanswered']]
    silent = [row['reason'] for row in left.values() if row['unanswered']]
    kept = sum(len(row.get('votes_so_far', ())) for row in left.values())
    if aside:
        print(f'{rejects.path}: set aside {len(aside):,} ({kinds(aside)}); --retry-rejects asks again')
    if silent:
        print(f'{rejects.path}: no answer to {len(silent):,} ({kinds(silent)}); the same command asks again')
    if kept:
        print(f'{rejects.path}: {kept:,} votes of rows that lack some; the same command asks for the others')
    print(f'tokens: {work.tokens["in"]:,} in, {work.tokens["out"]:,} out{cost(work.tokens, args)}')
    if work.tokens['uncounted']:
        print(f'{work.tokens["uncounted"]:,} answers came without a count of their tokens')
    if work.signal:
        print('Stopped. The same command goes on from here.')
    return len(silent)


def check_targets(args: argparse.Namespace, rejects: Path) -> None:
    """Refuse files that may not or cannot be written, before a row is read; :class:`RowLog` looks at their rows."""
    read = {f'--{name}': getattr(args, name) for name in ('input', 'task', 'prompt')}
    read = {key: place for key, place in read.items() if place and Path(place).expanduser().exists()}
    for key, path, apart in (('--output', args.output, read), ('--rejects', rejects, read | {'--output': args.output})):
        files.check_file(path, key, 'rows of ours', lambda path: True, apart)


def generate(args: argparse.Namespace) -> int:
    """Do the work of the command and return its exit status."""
    task = with_labels(load_task(args.task), args.input, args.split)
    if args.votes and task.multi_label:
        raise UserError(f'{args.task}: found several labels to a row; expected one, of which --votes gives shares')
    template = read_prompt(args.prompt, list(task.answers.values()) if args.votes else ())
    rejects_path = args.rejects or args.output.with_suffix('.rejects.jsonl')

    check_targets(args, rejects_path)

    def rows() -> Iterator[Triplet]:
        labelled = not args.votes  # who is not shown the label can vote without one
        for row in itertools.islice(read_triplets(args.input, task, split=args.split, labelled=labelled), args.limit):
            if labelled and row['label'] == '':
                raise UserError(f'{args.input}, row {row["id"]}, field {task.label}: is missing; --blind needs none')
            yield row

    def aside(rejects: Mapping[str, dict[str, Any]]) -> dict[str, str | None]:
        kept = {} if args.retry_rejects else rejects
        return {idx: row.get('input') for idx, row in kept.items() if not row['unanswered']}

    if args.dry_run:
        done, skip = read_log(args.output, known)[0], aside(read_log(rejects_path, rejected)[0])
        dry_run((row for row in rows() if is_open(row, done, skip, args.votes)), template, args)
        return 0
    key = find_key(args.api_key_env, args.base_url)
    endpoint = Endpoint(args.model, args.base_url, key, args.body, args.retries, args.timeout)
    with closing(RowLog(args.output, known)) as output, closing(RowLog(rejects_path, rejected)) as rejects:
        for log in (output, rejects):
            if log.torn:
                tell(f'{log.path}: cut off a torn last line of {log.torn:,} bytes; its row is asked again')
        skip, before = aside(rejects.rows), len(output.rows)
        # One pass before anything is sent: it finds every bad row, and how many there are to ask.
        flags = Counter(is_open(row, output.rows, skip, args.votes) for row in rows())
        total, todo = flags.total(), flags[True]
        work = Run(endpoint, template, task.answers, args.attempts, output, rejects, votes=args.votes)
        open_rows = (row for row in rows() if is_open(row, output.rows, skip, args.votes))
        try:
            with tqdm(total=todo, desc='asking', disable=None) as bar:  # on a terminal only

                def on_row() -> None:
                    bar.set_description(f'{len(output.rows):,} rationales, {len(rejects.rows):,} rows without', False)
                    bar.update()

                asyncio.run(work.ask_all(open_rows, args.concurrency, on_row))
        finally:
            rejects.keep_only(lambda idx: idx not in output.rows)
            unanswered = summarise(work, total, before, args)
    return 128 + work.signal if work.signal else int(unanswered > 0)


def json_object(text: str) -> dict[str, Any]:
    """The ``type`` of an argument that is a JSON object."""
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise argparse.ArgumentTypeError(f'found {text!r}; expected a JSON object, such as {{"seed": 1}}')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog='dhrd rationales',
        description='Ask a teacher model behind an OpenAI-compatible endpoint for a rationale of every row.',
        epilog='The key is read from OPENAI_API_KEY. Exit status: 0 done (rows may be set aside), 1 rows went '
        'without an answer, 2 an error, 130 or 143 stopped. Stopped or killed, the same command goes on.',
    )
    add = parser.add_argument
    add('--task', required=True, help='a task by name (rte, ...) or a YAML template')
    add('--input', required=True, help='JSON, JSONL, CSV or Parquet file, a folder with one for each split, or hub:')
    add('--split', help='train, validation or test, for folders and the hub')
    add('--output', required=True, type=Path, help='JSONL file that rationales are appended to')
    add('--rejects', type=Path, help='file for rows set aside; default: OUTPUT with .rejects.jsonl')
    add('--retry-rejects', action='store_true', help='ask again for the rows set aside by an earlier run')
    add('--model', required=True, help="the model's name at the endpoint")
    add('--base-url', help='address of the endpoint, up to and with /v1; default: OPENAI_BASE_URL or OpenAI')
    add('--api-key-env', default='OPENAI_API_KEY', metavar='NAME', help='variable with the key; default: %(default)s')
    add('--blind', action='store_true', help='do not show the label; the answers become probabilities')
    add('--votes', type=number(int, 1, 1000), default=1, help='of each row, with --blind; default: %(default)s')
    add(
        '--prompt',
        type=Path,
        help='template with {input_text}, {answer} (blind: {answers}) and the sentinel; default: built in',
    )
    add('--concurrency', type=number(int, 1, 1000), default=8, help='requests in flight; default: %(default)s')
    add('--retries', type=number(int, 0, 100), default=5, help='of one request (429, 5xx, ...); default: %(default)s')
    add('--timeout', type=number(float, 0.01), default=120.0, help='seconds for one request; default: %(default)s')
    add('--attempts', type=number(int, 1, 100), default=3, help='to get a usable answer; default: %(default)s')
    add('--max-tokens', type=number(int, 1), default=500, help='of an answer; default: %(default)s')
    add('--temperature', type=number(float, 0, 2), help='default: 0.1, with --blind 0.7')
    add('--top-p', type=number(float, 0, 1), help='default: 0.7, with --blind 1')
    add(
        '--extra-body',
        type=json_object,
        default={},
        metavar='JSON',
        help='more of the request, or other values: \'{"reasoning_effort": "none"}\'; null leaves a field out',
    )
    add('--limit', type=number(int, 1), help='only the first LIMIT rows')
    add('--dry-run', action='store_true', help='print the first prompts and an estimate; send nothing')
    add('--price-in', type=number(float, 0), metavar='PRICE', help='of a million tokens in')
    add('--price-out', type=number(float, 0), metavar='PRICE', help='of a million tokens out')
    args = parser.parse_args(argv)
    if args.output.suffix != '.jsonl':
        raise UserError(f'--output {args.output}: expected a name that ends in .jsonl')
    args.base_url = args.base_url or os.environ.get('OPENAI_BASE_URL') or None
    if args.base_url and not re.match(r'https?://[^/]', args.base_url):
        raise UserError(f'--base-url {args.base_url}: expected an address that begins with http:// or https://')
    with user_errors(f'--base-url {args.base_url}', ValueError):
        urlsplit(args.base_url or '').port  # noqa: B018  it is refused where it is no number, and so are half brackets
    if args.votes > 1 and not args.blind:
        raise UserError(f'--votes: found {args.votes} without --blind; a teacher that is shown the label votes for it')
    args.votes = args.votes if args.blind else 0
    # Votes that are to differ: as in Wang et al., arXiv:2203.11171. Else the paper's.
    temperature, top_p = (0.7, 1.0) if args.blind else (0.1, 0.7)
    temperature = temperature if args.temperature is None else args.temperature
    top_p = top_p if args.top_p is None else args.top_p
    body = {'max_tokens': args.max_tokens, 'temperature': temperature, 'top_p': top_p, **args.extra_body}
    args.body = {key: value for key, value in body.items() if value is not None}
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``dhrd rationales``.

    Args:
        argv: the arguments after the verb. Default: those of the command line.

    Returns:
        The exit status: 0; 1 where rows went unanswered; 2 after a user's mistake; 130 or 143 if stopped.
    """
    return run(lambda: generate(parse_args(argv)))
