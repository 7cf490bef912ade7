"""Whether a rationale states the label."""

import re
from collections.abc import Iterable

# Words too common to count wherever they stand: "there is no evidence" does not say that the answer is no.
ADJECTIVES = {'true', 'false', 'correct', 'incorrect', 'right', 'wrong', 'same', 'different'}
EVERYDAY = {'yes', 'no', 'neither', 'both', 'none'} | ADJECTIVES

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


def restated(rationale: str, words: Iterable[str]) -> str | None:
    """The first of ``words`` that a rationale states, or None: does it give the label away?

    The rule, upper and lower case being one:

    - A word or phrase counts where it stands as whole words: ``entailment`` in "so it is an entailment",
      not in "entailments". Spaces, ``_`` and ``-`` inside it do not matter: ``not_entailment`` counts in
      "not entailment", ``choice1`` in "choice 1".
    - The everyday words (``EVERYDAY``, single letters and numbers) count only as a verdict: opening a
      sentence before punctuation ("No, ..."), said of the claim ("the answer is no", "this is
      therefore false because", "label: 1"), or naming it ("a true statement"). "There is no evidence",
      "it is true that cats purr" and "a 2-0 win" pass.

    It finds the words, the label's name and its answer text, not paraphrases of them.
    """
    for word in words:
        parts = re.findall(r'\d+|[^\d\s_-]+', word.strip().rstrip('.!?'))
        if not parts:
            continue
        phrase = r'[\s_-]*'.join(map(re.escape, parts))
        bare = parts[0]
        everyday = len(parts) == 1 and (bare.lower() in EVERYDAY or len(bare) == 1 or bare.isdecimal())
        pattern = _verdict(phrase) if everyday else rf'(?<![^\W_]){phrase}(?![^\W_])'
        if re.search(pattern, rationale, re.IGNORECASE):
            return word
    return None


def _verdict(word: str) -> str:
    """A pattern for an everyday word where it passes judgement, see :func:`restated`."""
    said = rf'(?:{_SUBJECT}{_IS}{_ADVERB}|\b(?:therefore|thus|hence|so),?)\W*?\b{word}{_CLOSE}{_OVER}'
    if not word.isalpha():
        return said
    opens = rf'(?:^|[.!?;:\n])[ \t{_QUOTES}(\[-]*{word}{_CLOSE}\s*(?:[,.;:!{_DASH}]|$)'
    noun = rf'\b{word}\s+(?:claim|statement|sentence|hypothesis|proposition|answer)\b'
    return f'{said}|{opens}|{noun}' if word.lower() in ADJECTIVES else f'{said}|{opens}'
