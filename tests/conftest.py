"""Fixtures that more than one test file needs."""

import os
from pathlib import Path

import pytest

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


@pytest.fixture(scope='module')
def one_thread():
    """For tiny models: a second thread would only spin, ten times slower where the cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
