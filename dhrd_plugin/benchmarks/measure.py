"""Times and memory, taken side by side: machines are noisy, so what holds is a ratio within one run."""

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

PACKAGES = ('dhrd-plugin', 'torch', 'transformers', 'mosaicml', 'mosaicml-streaming', 'tokenizers', 'onnxruntime')


def interleave(
    works: Mapping[str, Callable[[], object]], repetitions: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each repetition of each work; every round runs all of them, each time another one first.

    Args:
        works: what to run, by name.
        repetitions: rounds that count.
        warmup: rounds before them that do not.

    Returns:
        By name one number for each round, so that those of one round can be divided by each other.
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


def time_once(work: Callable[[], object]) -> float:
    """Seconds that one call takes, with what it leaves running on a GPU."""
    gc.collect()  # the garbage of the one before is not this one's
    _wait_for_gpu()
    start = time.perf_counter()
    work()
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Round by round, what of one is to the other: a slow spell of the machine falls on both."""
    return [a / b for a, b in zip(of, to, strict=True)]


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method='inclusive')
    return [first, third]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


# ------------------------------------------------------------------------------------------ memory


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes that a call holds at most beyond those held before it: of the GPU where there is one, else resident.

    Linux keeps the peak of the resident set itself, so nothing between two samples is missed. What earlier calls
    freed is given back to the system first; run the work once before, so that what is made once is there.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')
    before = _status('VmRSS')
    work()
    return max(0, _status('VmHWM') - before)


def _status(key: str) -> int:
    found = re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert found is not None
    return int(found[1]) * 1024


# ----------------------------------------------------------------------------------------- machine


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, memory, load, GPU and versions, as plain data."""
    import torch

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
