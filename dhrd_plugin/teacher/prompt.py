"""What a teacher is asked, and which of its answers can be used (paper, appendix E.3)."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dhrd_plugin.data.leaks import restated
from dhrd_plugin.errors import UserError, one_line, user_errors

SENTINEL = '[END OF REASONING]'

PROMPT = """\
Here is a question together with its correct answer. Explain why the answer is correct.

{input_text}

Correct answer: {answer}

Let's think step by step. Reason from the text above to the answer in two to four sentences. \
Do not state the answer in your explanation: neither "{answer}" nor words that only say the same.
Write the explanation first, then {sentinel} on a line of its own, then the answer.
""".replace('{sentinel}', SENTINEL)

# For votes: the label is not shown.
BLIND_PROMPT = """\
Here is a question. Its possible answers are: {answers}.

{input_text}

Let's think step by step. Reason from the text above to the answer in two to four sentences. \
Do not state the answer in your explanation.
Write the explanation first, then {sentinel} on a line of its own, then the answer, in the words given above.
""".replace('{sentinel}', SENTINEL)

# What may stand before and behind the label after the sentinel.
_HEAD = (
    r'(?:(?:so|thus|therefore|hence),? )?(?:the |my |this |that )?(?:final |correct |right )?'
    r'(?:answer|label|choice|option|verdict|conclusion|claim|statement|it)(?: is| must be| would be)?[\s:=]+'
)
_END = r'(?=\s*(?:$|[\n,.;:!()\u2013\u2014](?!\d)|- |(?:because|since|as)\b))'


def read_prompt(path: Path | None, answers: Collection[str] = ()) -> str:
    """The prompt template: a UTF-8 file with the three parts of ours, by default ours; every other brace is text.

    Where there are ``answers`` to choose from, it shows those, and not the row's.
    """
    choice = ', '.join(answers)
    if path is None:
        return BLIND_PROMPT.replace('{answers}', choice) if answers else PROMPT
    with user_errors(f'{path}: not a UTF-8 text', OSError, UnicodeDecodeError):
        template = path.read_text('utf-8')
    parts = ('{input_text}', '{answers}' if answers else '{answer}', SENTINEL)
    for needed in parts:
        if needed not in template:
            raise UserError(f'{path}: the prompt has no {needed}; expected {parts[0]}, {parts[1]} and {SENTINEL}')
    if answers and '{answer}' in template:
        raise UserError(f'{path}: the prompt has {{answer}}, which tells the label; with --blind expected none')
    return template.replace('{answers}', choice) if answers else template


def build_prompt(triplet: Mapping[str, Any], template: str = PROMPT) -> str:
    """Fill a template in one pass, so that braces inside a row's own text stay as they are."""
    return re.sub(r'\{(input_text|answer)\}', lambda match: triplet[match[1]], template)


def split_answer(text: str) -> tuple[str, str | None]:
    """A teacher's answer as the explanation and what follows the sentinel (``None`` without a sentinel).

    What a reasoning model thinks before, up to ``</think>``, is no part of it: the sentinel may stand there, too.
    """
    explanation, sentinel, answer = text.rpartition('</think>')[2].partition(SENTINEL)
    return explanation.strip(), answer.strip() if sentinel else None


def read_label(answer: str | None, answers: Mapping[str, str]) -> str | None:
    """The label whose name or answer text (the values of ``answers``) a teacher's answer begins with, if any."""
    named = {label: _named(answer or '', (label, words)) for label, words in answers.items()}
    label = max(named, key=lambda label: named[label], default=None)
    return label if label is not None and named[label] else None


def _named(answer: str, names: Iterable[str]) -> int:
    """The length of the longest name that an answer begins with; 0 without one.

    It may be more than the name: "**Answer:** Yes, it rains.", "1. The sun rose.", "The answer is no".
    """
    said = _plain(answer)
    found = (name for name in map(_plain, names) if re.match(rf'(?:{_HEAD})?\(?{re.escape(name)}{_END}', said))
    return max(map(len, found), default=0)


def _plain(text: str) -> str:
    """Without quotes, markup, the sentinel said once more, and what parts the words of a name."""
    text = re.sub(r'[*`"\'\u2018\u2019\u201c\u201d]', '', text.replace(SENTINEL, '\n')).strip().rstrip('. \n')
    return re.sub(r'(?<=\w)[ _-]+(?=\w)', ' ', text).casefold()


def check_answer(
    text: str, finish_reason: str | None, words: Collection[str], others: Collection[str] = ()
) -> str | None:
    """Why a teacher's answer cannot be used, or ``None`` where it can.

    Args:
        text: the whole answer.
        finish_reason: as the endpoint gave it.
        words: what the explanation may not state, see :func:`~dhrd_plugin.data.leaks.restated`.
        others: names and answer texts of the wrong labels. Where anything follows the sentinel it begins with one
            of ``words`` and not with one of these; without ``words``, or where nothing does, that is not looked at.
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
    if answer and words:
        own, other = _named(answer, words), _named(answer, others)
        if other > own:
            return f'answers with another label: {one_line(answer, 80)!r}'
        if not own:
            return no_label(answer)
    return None


def no_label(answer: str | None) -> str:
    """The reason to set an answer aside that ends in no label."""
    return f'answers with no label: {one_line(answer or "", 80)!r}'


def kinds(reasons: Iterable[str]) -> str:
    """Reasons counted by kind, the most frequent first: ``time-out 3, HTTP 500 1``."""
    counts = Counter(re.split(r'[:(]', reason)[0].strip() for reason in reasons)
    return ', '.join(f'{kind} {count:,}' for kind, count in counts.most_common())
