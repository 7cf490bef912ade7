"""Files out of object storage: whole, checked, and within a stated time.

Addresses are Streaming's: ``s3://`` (``S3_ENDPOINT_URL`` for another server than Amazon's), ``gs://``,
``oci://``, ``azure://``, ``azure-dl://``, ``hf://``, ``dbfs:/Volumes`` and so on, reached by Streaming's
downloaders with the credentials that each provider's client finds in the environment.
"""

import functools
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

from dhrd_plugin.errors import UserError

__all__ = ['ATTEMPTS', 'TIMEOUT', 'fetch', 'is_remote', 'join', 'one_line', 'read']

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
ABSENT = (
    '404', 'NoSuchKey', 'NoSuchBucket',  # botocore's codes; then the names of the others' errors
    'FileNotFoundError', 'NotFound', 'ResourceNotFoundError', 'ResourceDoesNotExist',
    'EntryNotFoundError', 'RemoteEntryNotFoundError', 'RepositoryNotFoundError', 'RevisionNotFoundError',
)  # fmt: skip
# What another attempt cannot mend: no or wrong credentials, a package that is not installed.
DENIED = ('401', '403', 'AccessDenied', 'InvalidAccessKeyId', 'SignatureDoesNotMatch', 'ExpiredToken')
FINAL = (ImportError, ValueError, TypeError, KeyError, PermissionError)

log = logging.getLogger(__name__)
T = TypeVar('T')


def is_remote(place: str | Path) -> bool:
    """Whether ``place`` is an address such as ``s3://bucket/rte``, and no folder here."""
    return isinstance(place, str) and urlparse(place).scheme != ''


def join(place: str | Path, *names: str) -> str | Path:
    """A name under a folder or an address."""
    names = tuple(filter(None, names))
    return '/'.join((place.rstrip('/'), *names)) if isinstance(place, str) else place.joinpath(*names)


def fetch(remote: str, local: Path, timeout: float = TIMEOUT, attempts: int = 1) -> bool:
    """Downloads one file; False where there is none. See ``read``."""
    data = read(remote, timeout, attempts)
    if data is not None:
        local.write_bytes(data)
    return data is not None


def read(remote: str, timeout: float = TIMEOUT, attempts: int = ATTEMPTS) -> bytes | None:
    """The bytes of one file; None where there is none.

    Args:
        remote (str): its address, or a path.
        timeout (float): the seconds that one attempt may take, whatever the provider's client would
            wait for. Default: 60.
        attempts (int): how often to try; after 1, 2, 4, ... seconds. Default: 5.

    Raises:
        UserError: the storage cannot be reached or refuses; the error names the address.
    """
    for attempt in range(1, attempts + 1):
        try:
            return within(timeout, functools.partial(_read_once, remote, timeout))
        except Exception as error:  # of many kinds, one for each provider
            if _is_absent(error):
                return None
            _client.cache_clear()
            if attempt == attempts or _is_final(error):
                raise UserError(_complaint(remote, error, attempt)) from None
            pause = min(2.0 ** (attempt - 1), LONGEST_PAUSE)
            log.warning(f'{remote}: attempt {attempt} of {attempts} failed: {one_line(error)}; again in {pause:g} s')
            time.sleep(pause)
    raise UserError(f'{remote}: cannot be read in {attempts} attempts; expected 1 or more')


def within(seconds: float, work: Callable[[], T]) -> T:
    """What ``work`` gives, if it gives it within so many seconds.

    Raises:
        TimeoutError: it did not; it is left to itself, in a thread that keeps no process alive.
    """
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f'not here after {seconds:g} s (download_timeout)') from None
    if error is not None:
        raise error
    return value


def one_line(error: BaseException) -> str:
    """Kind and text of an error, without the secrets that an address may carry."""
    kind = f'{type(error).__name__} {_code(error)}'.strip()
    return f'{kind}: {_without_secrets(" ".join(str(error).split()))[:300]}'


def _without_secrets(text: str) -> str:
    return re.sub(r'[?](sig|X-Amz)[^ ]*', '', re.sub(r'(?<=://)[^/@\s:]+:[^/@\s]+@', '', text))


def _read_once(remote: str, timeout: float) -> bytes:
    with tempfile.TemporaryDirectory(prefix='dhrd-', ignore_cleanup_errors=True) as folder:
        path = Path(folder) / 'file'
        client = _client(remote.rpartition('/')[0], os.getpid(), frozenset(os.environ.items()))
        client.download(remote, str(path), timeout)
        return path.read_bytes()


@functools.lru_cache(maxsize=16)
def _client(place: str, process: int, environment: frozenset[tuple[str, str]]) -> Any:
    # One for each process: a connection that a fork has copied would mix up two processes' answers.
    # And one for each endpoint and key, which providers' clients read from the environment.
    from streaming.base.storage.download import CloudDownloader

    return CloudDownloader.get(place)


def _code(error: BaseException) -> str:
    response = getattr(error, 'response', None)  # botocore's
    if isinstance(response, dict):
        return str(response.get('Error', {}).get('Code'))
    return str(getattr(error, 'status', ''))  # OCI's


def _is_absent(error: BaseException) -> bool:
    return _code(error) in ABSENT or type(error).__name__ in ABSENT


def _is_final(error: BaseException) -> bool:
    return _code(error) in DENIED or isinstance(error, FINAL) or 'Credential' in type(error).__name__


def _complaint(remote: str, error: Exception, attempts: int) -> str:
    scheme = urlparse(remote).scheme
    tried = f' ({attempts} attempts)' if attempts > 1 else ''
    way_out = f'; {WAYS_OUT[scheme]}' if scheme in WAYS_OUT else ''
    if scheme == 's3':
        way_out += f', which is {_without_secrets(os.environ.get("S3_ENDPOINT_URL") or "not set")}'
    return f'{remote}: cannot be read: {one_line(error)}{tried}{way_out}'
