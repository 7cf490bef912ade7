"""Times and memory, taken side by side: machines are noisy, so what holds is a ratio within one run."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

PACKAGES = ('dhrd-plugin', 'torch', 'transformers', 'mosaicml', 'mosaicml-streaming', 'tokenizers', 'onnxruntime')
MIB = 2**20

Work = Callable[[], object]


def interleave(works: Mapping[str, Work], repetitions: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time several works in rounds; each round runs all of them, and starts with another one.

    Args:
        works: what to run, by name.
        repetitions: rounds that count.
        warmup: rounds before them that do not. Default: 1.

    Returns:
        Seconds by name, one for each round, so that those of one round can be divided by each other.
    """
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(-warmup, repetitions), f'{len(names)} ways, rounds', disable=None):  # on a terminal
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent = time_once(works[name])
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def time_once(work: Work) -> float:
    """Time one call in seconds, including what it leaves running on a GPU."""
    gc.collect()  # the garbage of the one before is not this one's
    _wait_for_gpu()
    start = time.perf_counter()
    work()
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rates(count: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Divide a number of rows by each way's seconds: rows a second."""
    return {name: [count / spent for spent in values] for name, values in seconds.items()}


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Divide round by round: a slow spell of the machine falls on both."""
    return [a / b for a, b in zip(of, to, strict=True)]


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third quartile."""
    return np.percentile(values, [25, 75]).tolist()


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of the values do not exceed."""
    return float(np.percentile(values, percent, method='inverted_cdf'))


def peak_memory(work: Work) -> int:
    """Measure the bytes that a call holds at its peak beyond those held before it.

    On a GPU this is the GPU's memory, else the resident set, whose peak Linux records itself, so that nothing between
    two samples is missed. Memory freed earlier is first given back to the system. Run the work once before, so that
    what it makes only once exists already.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')
    before = resident()
    work()
    return max(0, resident('VmHWM') - before)


def resident(key: str = 'VmRSS') -> int:
    """The bytes of this process that are resident, or with ``VmHWM`` were at the peak."""
    found = re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert found is not None
    return int(found[1]) * 1024


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, memory, load, GPU and versions, as plain data."""
    return {
        'processor': _processor(),
        'cores': len(os.sched_getaffinity(0)),
        'threads': torch.get_num_threads(),
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
        'load_average': round(os.getloadavg()[0], 2),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'system': f'{platform.system()} {platform.release()}',
        'versions': {'python': platform.python_version(), **_versions()},
    }


def _processor() -> str:
    with suppress(OSError):
        found = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
