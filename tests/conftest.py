"""Fixtures that more than one test file needs."""

import os
import subprocess
from pathlib import Path

import pytest

pytest_plugins = ['s3']

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='session')
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope='session')
def shared() -> Path:
    """The real data beside the checkout; tests that ask for it skip where it is absent."""
    folder = Path(os.environ.get('DHRD_SHARED', ROOT.parent / 'shared')) / 'data'
    if not folder.is_dir():
        pytest.skip(f'no real data at {folder}')
    return folder


@pytest.fixture(scope='session')
def sample() -> Path:
    """The triplets that the package ships."""
    return ROOT / 'dhrd_plugin' / 'data' / 'sample'


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """An empty place for the caches of streams."""
    monkeypatch.setenv('DHRD_CACHE', str(tmp_path / 'caches'))
    return tmp_path / 'caches' / 'streams'


@pytest.fixture
def tmpfs():
    """Mounts a file system of so many bytes (``360k``) on a folder, until the test ends."""
    mounted = []

    def mount(folder: Path, size: str) -> Path:
        folder.mkdir(parents=True)
        command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip('may not mount a tmpfs')
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(['umount', '-l', folder], check=True)


@pytest.fixture(scope='module')
def one_thread():
    """For tiny models: a second thread would only spin, ten times slower where the cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
