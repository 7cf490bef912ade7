"""Files from object storage: whole, or an error within a stated time.

Addresses are Streaming's: ``s3://`` (``S3_ENDPOINT_URL`` for a server other than Amazon's), ``gs://``,
``oci://``, ``azure://``, ``azure-dl://``, ``hf://``, ``dbfs:/Volumes`` and so on. Streaming's downloaders
read them, with the credentials that each provider's client finds in the environment.
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

from dhrd_plugin import files
from dhrd_plugin.errors import UserError, error_code, one_line, user_errors
from dhrd_plugin.redact import without_secrets

ATTEMPTS = 5  # with 1, 2, 4 and 8 seconds between them
TIMEOUT = 60.0  # seconds that one attempt may take
LONGEST_PAUSE = 30.0
WAYS_OUT = {
    's3': 'check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and S3_ENDPOINT_URL',
    'gs': 'check GOOGLE_APPLICATION_CREDENTIALS, or GCS_KEY and GCS_SECRET',
    'oci': 'check ~/.oci/config',
    'azure': 'check AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY',
    'azure-dl': 'check AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY',
    'dbfs': 'check DATABRICKS_HOST and DATABRICKS_TOKEN',
    'hf': 'check HF_TOKEN',
}
ABSENT = (  # botocore's codes, then the class names of the others' errors
    '404',
    'NoSuchKey',
    'NoSuchBucket',
    'FileNotFoundError',
    'NotFound',
    'ResourceNotFoundError',
    'ResourceDoesNotExist',
    'EntryNotFoundError',
    'RemoteEntryNotFoundError',
    'RepositoryNotFoundError',
    'RevisionNotFoundError',
)
# Another attempt does not help: no or wrong credentials, a package that is not installed.
DENIED = ('401', '403', 'AccessDenied', 'InvalidAccessKeyId', 'SignatureDoesNotMatch', 'ExpiredToken')
FINAL = (ImportError, ValueError, TypeError, KeyError, PermissionError)

log = logging.getLogger(__name__)
T = TypeVar('T')


def is_remote(place: str | Path) -> bool:
    """Whether ``place`` is an address such as ``s3://bucket/rte``, and neither a local path nor ``hub:NAME``."""
    return isinstance(place, str) and files.ADDRESS.match(place) is not None


def check_address(address: str, key: str = '') -> None:
    """Refuse an address of which the providers' clients would leave something out, and so read or write elsewhere.

    Composer reads a path on this machine so, too.

    Args:
        address: such as ``s3://bucket/rte``.
        key: what names it, for the message. Default: nothing.
    """
    with user_errors(f'{key}: {address}' if key else address, ValueError):  # no host name
        parts = urlparse(address)
    kept = f'//{parts.netloc}{parts.path}' if parts.netloc else parts.path
    if (address.partition(':')[2] if parts.scheme else address) not in (kept, f'//{kept}'):
        cut = next((character for character in address if character in '#?;' or not character.isprintable()), address)
        raise UserError(
            f'{key + ": " if key else ""}{one_line(address)}: found {cut!r}, which cuts an address off; expected one '
            "without '#', '?', ';' and line ends"
        )


def join(place: str | Path, *names: str) -> str | Path:
    """A name under a folder or an address."""
    names = tuple(filter(None, names))
    return '/'.join((place.rstrip('/'), *names)) if isinstance(place, str) else place.joinpath(*names)


def read(remote: str, timeout: float = TIMEOUT, attempts: int = ATTEMPTS) -> bytes | None:
    """The bytes of one file, by its address or path; ``None`` where there is none.

    An attempt may take ``timeout`` seconds, however long the provider's client would wait.
    """
    if is_remote(remote):
        check_address(remote)
    for attempt in range(1, attempts + 1):
        try:
            return within(timeout, functools.partial(_read_once, remote, timeout))
        except Exception as error:  # each provider has errors of its own
            if error_code(error) in ABSENT or type(error).__name__ in ABSENT:
                return None
            _client.cache_clear()
            if attempt == attempts or _is_final(error):
                raise UserError(_complaint(remote, error, attempt)) from None
            pause = min(2.0 ** (attempt - 1), LONGEST_PAUSE)
            log.warning(
                f'{remote}: attempt {attempt} of {attempts} failed: {one_line(error, kind=True)}; again in {pause:g} s'
            )
            time.sleep(pause)
    raise UserError(f'{remote}: cannot be read in {attempts} attempts; expected 1 or more')


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of ``work``, or a ``TimeoutError``: then it goes on in a thread that keeps no process alive."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a pool's threads would be waited for at exit
    wait([outcome], seconds)
    if not outcome.done():
        raise TimeoutError(f'not here after {seconds:g} s (download_timeout)')
    return outcome.result()


def _read_once(remote: str, timeout: float) -> bytes:
    with files.temporary() as folder:
        path = folder / 'file'
        client = _client(remote.rpartition('/')[0], os.getpid(), frozenset(os.environ.items()))
        client.download(remote, str(path), timeout)
        return path.read_bytes()


@functools.lru_cache(maxsize=16)
def _client(place: str, process: int, environment: frozenset[tuple[str, str]]) -> Any:
    # One for each process: a forked connection would mix up the answers to two processes. And one for
    # each endpoint and key, which the providers' clients read from the environment.
    from streaming.base.storage.download import CloudDownloader

    return CloudDownloader.get(place)


def _is_final(error: BaseException) -> bool:
    return error_code(error) in DENIED or isinstance(error, FINAL) or 'Credential' in type(error).__name__


def _complaint(remote: str, error: Exception, attempts: int) -> str:
    scheme = urlparse(remote).scheme
    tried = f' ({attempts} attempts)' if attempts > 1 else ''
    way_out = f'; {WAYS_OUT[scheme]}' if scheme in WAYS_OUT else ''
    if scheme == 's3':
        way_out += f', which is {without_secrets(os.environ.get("S3_ENDPOINT_URL") or "not set")}'
    return f'{remote}: cannot be read: {one_line(error, kind=True)}{tried}{way_out}'
