"""Fixtures that more than one test file needs."""

import atexit
import gc
import hashlib
import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytest_plugins = ['s3']

ROOT = Path(__file__).parent.parent
LONGEST = ('training/test_run.py', 'comparison/test_cells.py', 'checkpoints/test_resume.py', 'training/test_fsdp.py')
LONGEST += ('test_mcli.py', 'training/test_loggers.py', 'streams/test_training_from_s3.py', 'teacher/test_teacher.py')


def pytest_collection_modifyitems(items):
    """The longest files first: each is one worker's, and the others are not to wait for it at the end."""
    first = [str(ROOT / 'tests' / name) for name in LONGEST]
    items.sort(key=lambda item: first.index(str(item.path)) if str(item.path) in first else len(first))


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """What is imported stays: no garbage collection looks at its 700,000 objects, which takes half a second."""
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    gc.enable()


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
def refused(tmp_path, caches, monkeypatch, capfd):
    """Runs a verb on what it has to refuse, and returns the line that says so.

    One line, exit status 2, no traceback; under ``tmp_path`` nothing is written, changed or removed. Whatever asks
    on stdin is answered with yes.
    """

    def refuse(verb: str, *arguments: object) -> str:
        from dhrd_plugin.cli import main

        before = tree(tmp_path, caches.parent)
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr('sys.stdin', io.StringIO('yes\n' * 9))
            status = main([verb, *map(str, arguments)])
        text = ''.join(capfd.readouterr())
        lines = [line for line in text.splitlines() if line.startswith('error: ')]
        assert status == 2 and 'Traceback' not in text and text.splitlines()[-1:] == lines, text
        after = tree(tmp_path, caches.parent)
        assert after == before, sorted(set(after.items()) ^ set(before.items()))
        if len(os.listdir('/proc/self/fd')) > 500:
            release_shared_memory()
        return lines[0]

    return refuse


def tree(folder: Path, without: Path) -> dict[str, str]:
    """What lies in a folder, by its path: the hash of a file's content, where a link points; ``without`` left out."""
    found = {}
    for path in sorted(folder.rglob('*')):
        if path != without and without not in path.parents:
            content = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
            found[str(path)] = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else str(content)
    return found


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


@pytest.fixture(autouse=True, scope='module')
def shared_memory_of_a_file():
    """Each test file gives back its shared memory."""
    yield
    release_shared_memory()


def release_shared_memory() -> None:
    """Streaming keeps a data set's, 36 open files and more for each set beside it, until the process ends."""
    memory = sys.modules.get('streaming.base.shared.memory')
    if memory is None:
        return
    gc.collect()
    for item in gc.get_objects():
        if type(item) is memory.SharedMemory:
            atexit.unregister(item.cleanup)
            with suppress(BufferError):  # somebody still reads it
                item.cleanup()
