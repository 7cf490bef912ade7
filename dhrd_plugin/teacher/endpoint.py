"""The teacher's endpoint: one model's chat completions."""

import asyncio
import ipaddress
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dhrd_plugin.errors import UserError, one_line, user_errors

HOPELESS = {401: 'the key was refused', 402: 'the account has no credit', 404: 'no such model or address'}


class Reply(NamedTuple):
    """What is read of a chat completion; tokens are ``None`` where the endpoint does not count them."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def parse_reply(body: str) -> Reply:
    """Read the JSON of a chat completion; a ``ValueError`` says that it is not one."""
    try:
        reply = json.loads(body)
        choice, usage = reply['choices'][0], reply.get('usage') or {}
        text = choice['message'].get('content') or ''
        text.encode()  # half of a surrogate pair cannot be written to a file
        tokens = (usage.get(key) for key in ('prompt_tokens', 'completion_tokens'))
        counted = (value if isinstance(value, int) else None for value in tokens)
        return Reply(text, choice.get('finish_reason'), *counted)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'not a chat completion: {one_line(body, 80)!r}') from error


class Unanswered(Exception):
    """A request without a usable answer, and whether asking ``again`` can help."""

    def __init__(self, reason: str, again: bool = False):
        super().__init__(reason)
        self.again = again


class Endpoint:
    """One model's chat completions, through the ``openai`` client and its retries.

    The client waits and asks again on 429, 5xx, lost connections and time-outs: for as long as
    ``Retry-After`` says (up to a minute), otherwise half a second, doubled up to 8 s.

    Args:
        model: its name at the endpoint.
        base_url: ``None`` is ``OPENAI_BASE_URL``, or OpenAI itself.
        api_key: it is sent, and neither printed nor written anywhere.
        body: sampling settings and anything else of the request's body.
        retries: how often the client asks again.
        timeout: seconds until a request without a whole answer counts as failed.
    """

    def __init__(
        self, model: str, base_url: str | None, api_key: str, body: Mapping[str, Any], retries: int, timeout: float
    ):
        try:
            import openai
        except ImportError as error:
            raise UserError("the teacher needs the package openai: pip install 'dhrd-plugin[teacher]'") from error
        self.openai, self.model, self.body = openai, model, dict(body)
        # A shorter one is a placeholder such as "none", and a word that answers may contain.
        self.secret = api_key if len(api_key) >= 12 else '\0'
        with user_errors(_connection(base_url), kind=True):
            self.client = openai.AsyncOpenAI(
                base_url=base_url, api_key=api_key, max_retries=retries, http_client=_http_client(timeout)
            )
        self.address = str(self.client.base_url.copy_with(userinfo=b'')).rstrip('/')

    async def ask(self, prompt: str) -> Reply:
        """One answer; :class:`Unanswered` without one, a ``UserError`` where no request here can succeed."""
        try:
            response = await self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=[{'role': 'user', 'content': prompt}], extra_body=self.body
            )
            return parse_reply(response.text.replace(self.secret, '***'))
        except ValueError as error:
            raise Unanswered(str(error), again=True) from error
        except self.openai.APIStatusError as error:
            said = error.body.get('message') if isinstance(error.body, dict) else error.body
            reason = f'HTTP {error.status_code} ({self._redact(said or error.response.reason_phrase)})'
            if error.status_code in HOPELESS:
                problem = HOPELESS[error.status_code]
                raise UserError(f'{self.address}: {problem}, for the model {self.model!r}: {reason}') from None
            raise Unanswered(reason) from None
        except self.openai.APITimeoutError:
            raise Unanswered('time-out') from None
        except self.openai.APIConnectionError as error:
            kind = type(error.__cause__).__name__
            reason = self._redact(f'{kind}: {error.__cause__}')
            if kind == 'ConnectError':
                raise UserError(f'{self.address}: cannot be reached ({reason})') from None
            raise Unanswered(f'connection lost ({reason})') from None

    def _redact(self, text: object) -> str:
        text = str(text).encode(errors='replace').decode()  # half of a surrogate pair cannot be written to a file
        return one_line(text.replace(self.secret, '***'), 200)


def _connection(base_url: str | None) -> str:
    """What decides how an endpoint is reached, as far as it is set."""
    names = ('ALL_PROXY', 'HTTPS_PROXY', 'HTTP_PROXY', 'SSL_CERT_FILE', 'SSL_CERT_DIR')
    found = [name for name in names for name in (name, name.lower()) if os.environ.get(name)]
    return ', '.join([*([f'--base-url {base_url}'] if base_url else []), *found]) or 'the endpoint'


def _http_client(timeout: float) -> Any:
    # HTTP clients time silences only, so an answer that drips could hold its row for ever.
    import httpx
    import openai

    class HTTPClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
            try:
                return await asyncio.wait_for(super().send(request, **options), timeout)
            except asyncio.TimeoutError as error:
                raise httpx.ReadTimeout('no whole answer', request=request) from error

    return HTTPClient(timeout=timeout)


def find_key(variable: str, base_url: str | None) -> str:
    """The key from an environment variable; an endpoint on this machine needs none."""
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
