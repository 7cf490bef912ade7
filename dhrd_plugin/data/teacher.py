"""Ask a teacher for rationales (paper, appendix E.3): `scripts/generate_rationales.py`.

A language model behind any OpenAI-compatible endpoint is given a row and its gold label and thinks
step by step about why the label is right, without stating it. What it writes before the sentinel is
the row's rationale. Rationales go to a JSONL file, one whole line at a time, that a second start
continues and that `rationales:` of a training config and `--rationales` of `prepare_data.py` join
on `idx`.

The pure functions come first, then the two files, the endpoint, the run, and the command line.
"""

import argparse
import asyncio
import fcntl
import hashlib
import ipaddress
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.triplets import Triplet, read_triplets
from dhrd_plugin.errors import UserError

SENTINEL = '[END OF REASONING]'

PROMPT = """\
Here is a question together with its correct answer. Explain why the answer is correct.

{input_text}

Correct answer: {answer}

Let's think step by step. Reason from the text above to the answer in two to four sentences. \
Do not state the answer in your explanation: neither "{answer}" nor words that only say the same.
Write the explanation first, then {sentinel} on a line of its own, then the answer.
""".replace('{sentinel}', SENTINEL)


# The pure functions


def read_prompt(path: Path | None) -> str:
    """The prompt template: `PROMPT`, or a UTF-8 text file with `{input_text}`, `{answer}` and the sentinel.

    Every other brace is text. Raises UserError where one of the three is missing.
    """
    if path is None:
        return PROMPT
    try:
        template = path.read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read as UTF-8 text ({error})') from error
    for needed in ('{input_text}', '{answer}', SENTINEL):
        if needed not in template:
            raise UserError(f'{path}: the prompt has no {needed}; needed are {{input_text}}, {{answer}}, {SENTINEL}')
    return template


def build_prompt(triplet: Mapping[str, Any], template: str = PROMPT) -> str:
    """Fill a template in one pass, so that braces inside a row's own text stay as they are."""
    return re.sub(r'\{(input_text|answer)\}', lambda match: triplet[match[1]], template)


# Words too common to count wherever they stand: "there is no evidence" does not say that the answer is no.
ADJECTIVES = {'true', 'false', 'correct', 'incorrect', 'right', 'wrong', 'same', 'different'}
EVERYDAY = {'yes', 'no', 'neither', 'both'} | ADJECTIVES

_SUBJECT = (
    r'\b(?:answer|label|verdict|conclusion|claim|statement|sentence|hypothesis|premise|proposition|question'
    r'|choice|option|alternative|this|that|it|which)\b'
)
_IS = r'\W{0,3}(?:[:=]|\s(?:\w+\s+)?(?:is|was|are|be|being|has|seems|becomes)\b(?:\s+(?:\w+\s+)?to\s+be\b)?)'
_ADVERB = r'(?:\s+(?:\w+ly|thus|therefore|hence|indeed|so)\b)?'
_QUOTES = '"\'`*\u2018\u2019\u201c\u201d'
_CLOSE = rf'[{_QUOTES})\]]*'
_DASH = '\u2013\u2014'
_OVER = rf'\s*(?:[.,;:!?{_DASH}]|$|\b(?:because|since|as|and|but|given)\b)'


def _verdict(word: str) -> str:
    """A pattern for an everyday word where it passes judgement, see `restated`."""
    said = rf'(?:{_SUBJECT}{_IS}{_ADVERB}|\b(?:therefore|thus|hence|so),?)\W*?\b{word}{_CLOSE}{_OVER}'
    if not word.isalpha():
        return said
    opens = rf'(?:^|[.!?;:\n])[ \t{_QUOTES}(\[-]*{word}{_CLOSE}\s*(?:[,.;:!{_DASH}]|$)'
    noun = rf'\b{word}\s+(?:claim|statement|sentence|hypothesis|proposition|answer)\b'
    return f'{said}|{opens}|{noun}' if word.lower() in ADJECTIVES else f'{said}|{opens}'


def restated(rationale: str, words: Iterable[str]) -> str | None:
    """The first of `words` that a rationale states, or None: does it give the label away?

    The rule, upper and lower case being one:

    - A word or phrase counts where it stands as whole words: `entailment` in "so it is an entailment",
      not in "entailments". Spaces, `_` and `-` inside it do not matter: `not_entailment` counts in
      "not entailment", `choice1` in "choice 1".
    - The everyday words (`EVERYDAY`, single letters and numbers) count only as a verdict: opening a
      sentence before punctuation ("No, ..."), said of the claim ("the answer is no", "this is
      therefore false because", "label: 1"), or naming it ("a true statement"). "There is no evidence",
      "it is true that cats purr" and "a 2-0 win" pass.

    It finds the words, not paraphrases of them.

    Args:
        rationale: The explanation.
        words: The label's name and its answer text.
    """
    for word in words:
        parts = re.findall(r'\d+|[^\d\s_-]+', word.strip().rstrip('.!?'))
        if not parts:
            continue
        phrase = r'[\s_-]*'.join(map(re.escape, parts))
        everyday = len(parts) == 1 and (word.lower() in EVERYDAY or len(word) == 1 or word.isdecimal())
        pattern = _verdict(phrase) if everyday else rf'(?<![^\W_]){phrase}(?![^\W_])'
        if re.search(pattern, rationale, re.IGNORECASE):
            return word
    return None


def split_answer(text: str) -> tuple[str, str | None]:
    """A teacher's answer as (explanation, what stands after the sentinel; None without a sentinel)."""
    explanation, sentinel, answer = text.partition(SENTINEL)
    return explanation.strip(), answer.strip() if sentinel else None


def check_answer(
    text: str, finish_reason: str | None, words: Collection[str], others: Collection[str] = ()
) -> str | None:
    """Why a teacher's answer cannot be used, or None where it can.

    Args:
        text: The whole answer.
        finish_reason: As the endpoint gave it: `length` is an answer cut by the token limit.
        words: What the explanation may not state, see `restated`.
        others: Names and answer texts of the wrong labels; where one of them stands after the sentinel,
            the explanation argues for the wrong label. Default: none.
    """
    explanation, answer = split_answer(text)
    if finish_reason == 'length':
        return 'cut at the token limit'
    if finish_reason == 'content_filter':
        return 'withheld by the content filter'
    if not text.strip():
        return 'empty answer'
    if answer is None:
        return f'no {SENTINEL}'
    if not explanation:
        return f'nothing before {SENTINEL}'
    word = restated(explanation, words)
    if word is not None:
        return f'states the label: {word!r}'
    if answer.strip(' \n."\'*').casefold() in {other.casefold() for other in others}:
        return f'answers with another label: {one_line(answer)!r}'
    return None


class Reply(NamedTuple):
    """What is read of a chat completion; tokens are None where the endpoint does not count them."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def parse_reply(body: str) -> Reply:
    """Read the JSON of a chat completion; raises ValueError where it is none."""
    try:
        reply = json.loads(body)
        choice, usage = reply['choices'][0], reply.get('usage') or {}
        text = choice['message'].get('content') or ''
        text.encode()  # half of a surrogate pair cannot be written to a file
        tokens = (usage.get(key) for key in ('prompt_tokens', 'completion_tokens'))
        return Reply(text, choice.get('finish_reason'), *tokens)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'not a chat completion: {one_line(body, 80)!r}') from error


def one_line(text: object, limit: int = 300) -> str:
    """Any text as one line of at most `limit` characters."""
    line = ' '.join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + '…'


def fingerprint(triplet: Mapping[str, Any]) -> str:
    """Twelve hex digits that tell whether a rationale was written for this text and this answer."""
    return hashlib.sha1(f'{triplet["input_text"]}\0{triplet["answer"]}'.encode()).hexdigest()[:12]


# The two files


class RowLog:
    """A JSONL file that is only appended to, by one process at a time, one whole line a write.

    Opening it reads the rows that are there. A last line that a kill tore is cut off (`torn` holds its
    length in bytes), one that is whole but for its newline is completed; a file that is something else
    is refused untouched.

    Args:
        path: The file; made where it does not exist.
        keep: What to remember of a row, in `rows`, by its `idx`.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], Any]):
        self.path, self.keep = path, keep
        try:
            self.file = open(path, 'a+b', buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f'{path}: cannot be opened for writing ({error.strerror})') from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise UserError(f'{path}: another process is writing to it; name another file') from error
        self.rows, end = read_log(path, keep)
        self.torn = os.path.getsize(path) - end
        if self.torn:
            self.file.truncate(end)
        elif end and os.pread(self.file.fileno(), 1, end - 1) != b'\n':
            self.file.write(b'\n')

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and wait until it is on the disk."""
        line = json_line(row)
        try:
            if self.file.write(line) != len(line):
                raise OSError(None, 'it took only a part of a row')
            os.fsync(self.file.fileno())
        except OSError as error:
            raise UserError(f'{self.path}: cannot be written ({error.strerror})') from error
        self.rows[row['idx']] = self.keep(row)

    def keep_only(self, wanted: Callable[[str], bool]) -> None:
        """Rewrite the file, in one step, with the wanted of its `rows`, kept whole; the last thing done to it."""
        temporary = self.path.with_name(f'{self.path.name}.tmp')
        try:
            temporary.write_bytes(b''.join(json_line(row) for idx, row in self.rows.items() if wanted(idx)))
            os.replace(temporary, self.path)
        except OSError as error:
            raise UserError(f'{self.path}: cannot be written ({error.strerror})') from error

    def close(self) -> None:
        """Close the file; an empty one is removed."""
        if not os.path.getsize(self.path):
            self.path.unlink()
        self.file.close()


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSONL."""
    return (json.dumps(row, ensure_ascii=False) + '\n').encode()


def read_log(path: Path, keep: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], int]:
    """The rows of a `RowLog` by `idx`, and where its last whole line ends, in bytes."""
    rows: dict[str, Any] = {}
    end = 0
    if not path.exists():
        return rows, end
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                rows[str(row['idx'])] = keep(row)
            except (ValueError, TypeError, KeyError) as error:
                # A write that was cut short leaves the beginning of a line of ours, never anything else.
                if not line.endswith(b'\n') and line.startswith(b'{"idx": '[: len(line)]):
                    break
                raise UserError(f'{path}, line {number}: not a row of this program; name another file') from error
            end += len(line)
    return rows, end


# The endpoint

HOPELESS = {401: 'the key was refused', 402: 'the account has no credit', 404: 'no such model or address'}


class Unanswered(Exception):
    """A request that got no usable answer; `again` says whether asking again is of use."""

    def __init__(self, reason: str, again: bool = False):
        super().__init__(reason)
        self.again = again


class Endpoint:
    """One model's chat completions, through the `openai` client and its retries.

    The client waits and asks again on 429, 5xx, lost connections and time-outs: for as long as
    `Retry-After` says (up to a minute), else half a second, doubled up to 8 s.

    Args:
        model: The name the endpoint knows the model by.
        base_url: The endpoint's address; None is OPENAI_BASE_URL, or OpenAI itself.
        api_key: The key. It is sent, and stands in nothing that is printed or written.
        body: Sampling settings and anything else of the request's body.
        retries: How often the client asks again.
        timeout: Seconds until a request without a whole answer counts as failed.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None,
        api_key: str,
        body: Mapping[str, Any],
        retries: int = 5,
        timeout: float = 120,
    ):
        self.openai, self.model, self.body = import_openai(), model, dict(body)
        # A shorter one is a placeholder such as "none", and a word that answers may hold.
        self.secret = api_key if len(api_key) >= 12 else '\0'
        self.client = self.openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=retries, http_client=http_client(timeout)
        )
        self.address = str(self.client.base_url.copy_with(userinfo=b'')).rstrip('/')

    async def ask(self, prompt: str) -> Reply:
        """One answer. Raises Unanswered, or UserError where no request to this endpoint can succeed."""
        try:
            response = await self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=[{'role': 'user', 'content': prompt}], extra_body=self.body
            )
            return parse_reply(response.text.replace(self.secret, '***'))
        except ValueError as error:
            raise Unanswered(str(error), again=True) from error
        except self.openai.APIStatusError as error:
            said = error.body.get('message') if isinstance(error.body, dict) else error.body
            reason = f'HTTP {error.status_code} ({self.redact(said or error.response.reason_phrase)})'
            if error.status_code in HOPELESS:
                raise UserError(
                    f'{self.address}: {HOPELESS[error.status_code]}, for the model {self.model!r}: {reason}'
                ) from None
            raise Unanswered(reason) from None
        except self.openai.APITimeoutError:
            raise Unanswered('time-out') from None
        except self.openai.APIConnectionError as error:
            reason = self.redact(f'{type(error.__cause__).__name__}: {error.__cause__}')
            if type(error.__cause__).__name__ == 'ConnectError':
                raise UserError(f'{self.address}: cannot be reached ({reason})') from None
            raise Unanswered(f'connection lost ({reason})') from None

    def redact(self, text: object) -> str:
        """Words from outside, on one line and without the key."""
        return one_line(str(text).replace(self.secret, '***'), 200)


def import_openai() -> Any:
    """The `openai` package, which only the teacher needs."""
    try:
        import openai
    except ImportError as error:
        raise UserError("the teacher needs the package openai: pip install 'dhrd-plugin[teacher]'") from error
    return openai


def http_client(timeout: float) -> Any:
    """The client's own HTTP client, whose time-out is for a whole answer.

    HTTP clients time silences only, so an answer that drips could hold its row for ever.
    """
    import httpx

    class HTTPClient(import_openai().DefaultAsyncHttpxClient):
        async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
            try:
                return await asyncio.wait_for(super().send(request, **options), timeout)
            except asyncio.TimeoutError as error:
                raise httpx.ReadTimeout('no whole answer', request=request) from error

    return HTTPClient(timeout=timeout)


def find_key(variable: str, base_url: str | None) -> str:
    """The key from an environment variable; an endpoint on this machine does without one."""
    key = os.environ.get(variable, '').strip()
    if key and not (key.isascii() and key.isprintable()):
        raise UserError(f'{variable}: holds a character that no HTTP header may carry; set it to a key')
    if key or is_loopback(base_url):
        return key or 'none-needed'
    raise UserError(
        f'{variable}: no key there; set it (to any word where the endpoint needs none), name another '
        'variable with --api-key-env, or give the --base-url of an endpoint on this machine'
    )


def is_loopback(base_url: str | None) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(base_url or '').hostname or ''
    try:
        return host == 'localhost' or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# The run


@dataclass
class Run:
    """One run: rows in, rationales out.

    Args:
        endpoint: Who is asked.
        template: The prompt, see `build_prompt`.
        answers: The answer text of each label, `Task.answers`.
        attempts: How often a row is asked at most until an answer passes `check_answer`.
        output: Where the rationales go.
        rejects: Where the rows without one go, with the reason. A row that the endpoint did not answer
            at all is marked `unanswered` there: the next start asks it again.

    Attributes:
        tokens: What this run used: `in`, `out`, and answers that came without a count, `uncounted`.
        signal: The signal that ended the run, 0 if none did.
    """

    endpoint: Endpoint
    template: str
    answers: Mapping[str, str]
    attempts: int
    output: RowLog
    rejects: RowLog
    tokens: Counter[str] = field(default_factory=Counter)
    signal: int = 0
    silent: int = 0

    async def ask_all(self, rows: Iterator[Triplet], concurrency: int, on_row: Callable[[], None]) -> None:
        """Ask for every row, `concurrency` at a time; the next row is read when one is done."""

        async def worker() -> None:
            for triplet in rows:
                await self.ask_row(triplet)
                on_row()
                # A crowd of requests can fail together, a few odd rows in turn; more is the endpoint's fault.
                if self.silent >= max(3, concurrency):
                    last = list(self.rejects.rows.values())[-1]['reason']
                    raise UserError(f'{self.endpoint.address}: {self.silent} rows got no answer: {last}')
                if self.signal:
                    return

        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(worker()) for _ in range(concurrency)]
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop, number, tasks)
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

    def stop(self, number: int, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Ctrl-C lets the requests in flight come to their end; SIGTERM or a second one drops them."""
        if self.signal or number == signal.SIGTERM:
            for task in tasks:
                task.cancel()
        else:
            say('stopping: waiting for the answers in flight; Ctrl-C again drops them')
        self.signal = number

    async def ask_row(self, triplet: Triplet) -> None:
        """Ask for one row until an answer passes, and write what came of it."""
        used: Counter[str] = Counter()
        attempt, again, text, reason = 0, True, None, None
        while again and attempt < self.attempts and not (attempt and self.signal):
            attempt += 1
            text, reason, again = await self.ask_once(triplet, used)
        made = {'model': self.endpoint.model, 'attempts': attempt}
        made |= {'prompt_tokens': used['in'], 'completion_tokens': used['out'], 'input': fingerprint(triplet)}
        if reason is None:
            self.output.append({'idx': triplet['id'], 'rationale': split_answer(text or '')[0], **made})
        elif attempt == self.attempts or not again:  # else stopped, and the next start asks
            reject = {'idx': triplet['id'], 'reason': reason, 'unanswered': text is None, 'answer': text}
            self.rejects.append({**reject, **made})
        self.silent = self.silent + 1 if text is None else 0

    async def ask_once(self, triplet: Triplet, used: Counter[str]) -> tuple[str | None, str | None, bool]:
        """One answer (None: none came), why it is of no use (None: it is), whether to ask again then."""
        others = [pair for pair in self.answers.items() if pair[0] != triplet['label']]
        try:
            reply = await self.endpoint.ask(build_prompt(triplet, self.template))
        except Unanswered as error:
            return None, str(error), error.again
        tokens = {'in': reply.prompt_tokens or 0, 'out': reply.completion_tokens or 0}
        used.update(tokens)
        self.tokens.update(tokens, uncounted=reply.completion_tokens is None)
        words = (triplet['answer'], triplet['label'])
        reason = check_answer(reply.text, reply.finish_reason, words, sum(others, ()))
        return reply.text, reason, reason is not None


# The command line


def is_open(triplet: Triplet, done: Mapping[str, str | None], aside: Collection[str]) -> bool:
    """Whether a row has no rationale yet and was not set aside.

    Args:
        triplet: The row.
        done: The `fingerprint` of each `idx` of the output; None for a row that something else wrote.
        aside: The ids set aside.

    Raises:
        UserError: The rationale of this id was written for another text or answer.
    """
    ident = triplet['id']
    if ident not in done:
        return ident not in aside
    if done[ident] not in (None, fingerprint(triplet)):
        raise UserError(
            f'idx {ident!r}: the output holds a rationale of this id for another text or answer; '
            'other data needs another --output'
        )
    return False


def dry_run(rows: Iterable[Triplet], template: str, args: argparse.Namespace) -> None:
    """Print the first three prompts and what asking for all rows would come to."""
    asked = characters = 0
    for triplet in rows:
        prompt = build_prompt(triplet, template)
        asked, characters = asked + 1, characters + len(prompt)
        if asked <= 3:
            print(f'--- idx {triplet["id"]}\n{prompt}')
    tokens = {'in': characters // 4, 'out': asked * args.max_tokens}
    print(f'--- {asked:,} rows to ask: about {tokens["in"]:,} tokens in (4 characters each), at most '
          f'{tokens["out"]:,} out{cost(tokens, args)}; more where rows are asked again. Nothing was sent.')  # fmt: skip


def cost(tokens: Mapping[str, int], args: argparse.Namespace) -> str:
    """The price of tokens as `, cost 1.2345`, nothing where no price was given."""
    if args.price_in is None and args.price_out is None:
        return ''
    price = tokens['in'] * (args.price_in or 0) + tokens['out'] * (args.price_out or 0)
    return f', cost {price / 1e6:,.4f}'


def summarise(run: Run, total: int, before: int, args: argparse.Namespace) -> int:
    """Print where the run stands and return how many rows the endpoint left without an answer."""
    output, rejects = run.output, run.rejects
    print(f'{output.path}: {len(output.rows):,} rationales, {len(output.rows) - before:,} of them new; '
          f'the input has {total:,} rows')  # fmt: skip
    left = {idx: row for idx, row in rejects.rows.items() if idx not in output.rows}
    aside = [row['reason'] for row in left.values() if not row['unanswered']]
    silent = [row['reason'] for row in left.values() if row['unanswered']]
    if aside:
        print(f'{rejects.path}: set aside {len(aside):,} ({kinds(aside)}); --retry-rejects asks again')
    if silent:
        print(f'{rejects.path}: no answer to {len(silent):,} ({kinds(silent)}); the same command asks again')
    print(f'tokens: {run.tokens["in"]:,} in, {run.tokens["out"]:,} out{cost(run.tokens, args)}')
    if run.tokens['uncounted']:
        print(f'{run.tokens["uncounted"]:,} answers came without a count of their tokens')
    if run.signal:
        print('Stopped. The same command goes on from here.')
    return len(silent)


def kinds(reasons: Iterable[str]) -> str:
    """Reasons counted by their kind, the most frequent first: `time-out 3, HTTP 500 1`."""
    counts = Counter(re.split(r'[:(]', reason)[0].strip() for reason in reasons)
    return ', '.join(f'{kind} {count:,}' for kind, count in counts.most_common())


def generate(args: argparse.Namespace) -> int:
    """What the command does, once its arguments are read; returns the exit status."""
    task, template = load_task(args.task), read_prompt(args.prompt)
    rejects_path = args.rejects or args.output.with_suffix('.rejects.jsonl')

    def rows() -> Iterator[Triplet]:
        return itertools.islice(read_triplets(args.input, task, split=args.split), args.limit)

    def aside(rejects: Mapping[str, dict[str, Any]]) -> set[str]:
        return set() if args.retry_rejects else {idx for idx, row in rejects.items() if not row['unanswered']}

    if args.dry_run:
        done, skip = read_log(args.output, known)[0], aside(read_log(rejects_path, dict)[0])
        dry_run((row for row in rows() if is_open(row, done, skip)), template, args)
        return 0
    key = find_key(args.api_key_env, args.base_url)
    endpoint = Endpoint(args.model, args.base_url, key, args.body, args.retries, args.timeout)
    with closing(RowLog(args.output, known)) as output, closing(RowLog(rejects_path, dict)) as rejects:
        for log in (output, rejects):
            if log.torn:
                say(f'{log.path}: cut off a torn last line of {log.torn:,} bytes; its row is asked again')
        skip, before = aside(rejects.rows), len(output.rows)
        # One pass before anything is sent: it finds every bad row, and how many there are to ask.
        total, todo = count(is_open(row, output.rows, skip) for row in rows())
        run = Run(endpoint, template, task.answers, args.attempts, output, rejects)
        open_rows = (row for row in rows() if is_open(row, output.rows, skip))
        try:
            with progress_bar(run, todo) as on_row:
                asyncio.run(run.ask_all(open_rows, args.concurrency, on_row))
        finally:
            rejects.keep_only(lambda idx: idx not in output.rows)
            unanswered = summarise(run, total, before, args)
    return 128 + run.signal if run.signal else int(unanswered > 0)


def count(flags: Iterable[bool]) -> tuple[int, int]:
    """How many flags there are, and how many are true."""
    counts = Counter(flags)
    return counts.total(), counts[True]


def known(row: dict[str, Any]) -> str | None:
    """What the output file's rows are remembered by."""
    if not row['rationale']:
        raise ValueError('no rationale')
    return row.get('input')


@contextmanager
def progress_bar(run: Run, todo: int) -> Iterator[Callable[[], None]]:
    """A bar over the rows to ask, where stderr is a terminal; yields what to call after each row."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = ('{task.description}', BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task('asking', total=todo)

        def on_row() -> None:
            rationales, without = len(run.output.rows), len(run.rejects.rows)
            progress.update(bar, advance=1, description=f'{rationales:,} rationales, {without:,} rows without')

        yield on_row


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f'{message}; see --help')


def number(kind: type, low: float, high: float = float('inf')) -> Callable[[str], Any]:
    """The type of an argument: a number from `low` to `high`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = 'a whole number' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'{text!r} is not {what} from {low} to {high}')
        return value

    return read


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; raises UserError."""
    parser = Parser(
        prog='generate_rationales.py',
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
    add('--prompt', type=Path, help='template with {input_text}, {answer} and the sentinel; default: built in')
    add('--concurrency', type=number(int, 1, 1000), default=8, help='requests in flight; default: %(default)s')
    add('--retries', type=number(int, 0, 100), default=5, help='of one request (429, 5xx, ...); default: %(default)s')
    add('--timeout', type=number(float, 0.01), default=120.0, help='seconds for one request; default: %(default)s')
    add('--attempts', type=number(int, 1, 100), default=3, help='to get a usable answer; default: %(default)s')
    add('--max-tokens', type=number(int, 1), default=500, help='of an answer; default: %(default)s')
    add('--temperature', type=number(float, 0, 2), default=0.1, help='default: %(default)s')
    add('--top-p', type=number(float, 0, 1), default=0.7, help='default: %(default)s')
    add('--extra-body', type=json.loads, default={}, metavar='JSON', help='more of the request, or other values: '
        '\'{"reasoning_effort": "none"}\'; null leaves a field out')  # fmt: skip
    add('--limit', type=number(int, 1), help='only the first LIMIT rows')
    add('--dry-run', action='store_true', help='print the first prompts and an estimate; send nothing')
    add('--price-in', type=number(float, 0), metavar='PRICE', help='of a million tokens in')
    add('--price-out', type=number(float, 0), metavar='PRICE', help='of a million tokens out')
    args = parser.parse_args(argv)
    if args.output.suffix != '.jsonl':
        raise UserError(f'--output {args.output}: the name must end in .jsonl')
    if not isinstance(args.extra_body, dict):
        raise UserError('--extra-body: must be a JSON object, such as {"seed": 1}')
    args.base_url = args.base_url or os.environ.get('OPENAI_BASE_URL') or None
    if args.base_url and not re.match(r'https?://[^/]', args.base_url):
        raise UserError(f'--base-url {args.base_url}: must begin with http:// or https://')
    body = {'max_tokens': args.max_tokens, 'temperature': args.temperature, 'top_p': args.top_p, **args.extra_body}
    args.body = {key: value for key, value in body.items() if value is not None}
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, an error having been told in one line on stderr."""
    try:
        return generate(parse_args(argv))
    except UserError as error:
        say(f'error: {one_line(error, 1000)}')
        return 2
    except KeyboardInterrupt:
        return 130


def say(text: str) -> None:
    """A note, on stderr."""
    print(text, file=sys.stderr, flush=True)
