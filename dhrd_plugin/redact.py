"""What may be written and logged: plain data and text without passwords, keys and tokens."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

MASK = '***'
# Of a name in lower case, its words parted by `_`. A tokenizer's tokens (pad_token) are no secrets, and what is
# counted (max_tokens, tokenizer, as_tokens) does not end in `token`.
_SECRET_NAME = re.compile(
    r'(secret|passw(or)?d|passphrase|credential|dsn|connection_string|authorization|cookie)s?(_|$)'
    r'|(^|_)(pass|pwd|pat)$'
    r'|(account|access|api|auth|encryption|private|shared|sign(ing)?|ssh|storage)_?keys?(_|$)'
    r'|(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!eot_)(?<!mask_)(?<!image_)(?<!special_)token$'
)
_URL = re.compile(r'\w[\w+.-]*://[^\s\'"<>|]+')
_VALUE_OF_QUERY = re.compile(r'(?<==)[^&;]+')
# A name and its value in a text: `AccountKey=...;`, `loggers.x.hf_token: found 3;`, `{'password': '...'}`.
_NAMED = re.compile(
    r'(?P<name>[\w.-]+)(?P<parted>=|: found |["\']: *)'
    r'(?P<value>"[^"]*"|\'[^\']*\'|\{[^}]*\}|\[[^]]*\]|[^\s;,&\'")}\]]+)'
)
_BEARER = re.compile(r'\b(Bearer|Basic) +[\w.~+/=-]{6,}')


def is_secret(name: object) -> bool:
    """Whether what stands under this name is a secret: ``hf_token``, ``AccountKey``, ``db-password``."""
    words = re.sub(r'(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+', '_', str(name))
    return _SECRET_NAME.search(words.lower()) is not None


def without_secrets(value: Any) -> Any:
    """Plain data as it may be logged and written: passwords, keys and tokens become ``***``, in texts too.

    What stands under a secret's name goes whole, be it a number, a list or a mapping; of an address its
    ``user:password`` and the values of its query.
    """
    if isinstance(value, Mapping):
        return {
            key: MASK if _is_given(item) and is_secret(key) else without_secrets(item) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)([without_secrets(item) for item in value])
    return _clean(value) if isinstance(value, str) else value


def _is_given(value: Any) -> bool:
    """Whether there is anything to hide: not in ``null``, ``''``, ``{}``, nor in ``use_auth_token: true``."""
    return not isinstance(value, bool) and value not in (None, '', {}, [], ())


def _clean(text: str) -> str:
    text = _URL.sub(lambda match: _clean_url(match[0]), text)
    text = _NAMED.sub(lambda m: f'{m["name"]}{m["parted"]}{MASK}' if is_secret(m['name']) else m[0], text)
    return _BEARER.sub(rf'\1 {MASK}', text)


def _clean_url(address: str) -> str:
    scheme, _, rest = address.partition('://')
    try:
        parts = urlsplit(f'//{rest}')
    except ValueError:  # brackets that are no IPv6 address
        return f'{scheme}://{MASK}'
    _, at, host = parts.netloc.rpartition('@')
    path = parts.path
    if not at and '@' in rest and not re.fullmatch(r'[^:]*(:\d*)?|\[.*', host):  # a password with a `/`, `?` or `#`
        at, host, path, parts = '@', rest.rpartition('@')[2], '', parts._replace(query='', fragment='')
    query, fragment = (_VALUE_OF_QUERY.sub(MASK, part) for part in (parts.query, parts.fragment))
    query = f'?{query}' if query else ''
    fragment = f'#{fragment}' if fragment else ''
    return f'{scheme}://{f"{MASK}@" if at else ""}{host}{path}{query}{fragment}'
