"""What a comparison runs: its YAML, and the cells that tasks, arms and seeds make."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dhrd_plugin import files
from dhrd_plugin.comparison.results import PLAN, RESULTS, CellKey, read_plan
from dhrd_plugin.data.rows import find_source
from dhrd_plugin.errors import UserError, nearest
from dhrd_plugin.redact import without_secrets
from dhrd_plugin.streams.index import INDEX
from dhrd_plugin.streams.settings import named_streams
from dhrd_plugin.training.config import (
    Config,
    FromEnvironment,
    LoaderConfig,
    as_typed,
    changed,
    find_yaml,
    from_environment,
    load_config,
    loaders,
    merge,
    parse_overrides,
    read_yaml,
    used,
    written,
)
from dhrd_plugin.training.summary import say
from dhrd_plugin.training.targets import check_targets as check_run
from dhrd_plugin.training.targets import inputs

OURS = ('run_name', 'output_dir', 'seed')  # of each cell: what no task and no arm may have
# Where a run writes, and what it says meanwhile, is not what it finds.
UNSEEN = ('run_name', 'output_dir', 'save_folder', 'loggers', 'progress_bar', 'log_to_console', 'console_log_interval')
EXPORT, CHECKPOINTS = 'slim', 'checkpoints'
_OTHER = re.compile(r'\$\{(?!oc\.env:)')  # an interpolation of another key


@dataclass
class Comparison(FromEnvironment):
    """A comparison, as its YAML has it."""

    name: str = 'comparison'  # of the comparison
    variables: dict[str, Any] = field(default_factory=dict)  # for interpolation, such as ``${variables.data}``
    output_dir: str = 'runs/compare/${name}'  # for results and report
    base: str = MISSING  # a training YAML, by a path relative to this one
    # by name, what a task changes in it: the template, the data. ``null`` leaves one out
    tasks: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    arms: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # by name, what an arm changes in it; likewise
    baseline: str = 'pooled'  # the arm that the others are compared with
    average: bool = True  # whether tasks are averaged: not where they are settings, such as learning rates
    seeds: list[int] = field(default_factory=lambda: [17, 18, 19])  # each a run of every task and arm
    keep_exports: bool = False  # keep each cell's slim classifier; its predictions are kept in any case


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str  # its name in the comparison
    arm: str  # likewise
    seed: int  # of the run
    config: Config  # of the run

    @property
    def key(self) -> CellKey:
        """What tells it from the others."""
        return self.task, self.arm, self.seed

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.config.output_dir)

    @property
    def fingerprint(self) -> str:
        """A hash of the config that its result depends on; a key at its default, new ones too, changes nothing."""
        settings = {key: value for key, value in changed(self.config).items() if key not in UNSEEN}
        settings['callbacks'] = {**settings['callbacks'], 'drop_reasoning_head': None}
        text = json.dumps(without_secrets(settings), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def data(self) -> str | None:
        """A hash of what it reads on this machine, rows, rationales and template; None where some of it is not here."""
        task = self.config.task
        places = [place for loader in loaders(self.config).values() for place in _read_by(loader)]
        places += [Path(task)] if isinstance(task, str) and task.endswith(('.yaml', '.yml')) else []
        places = [place.expanduser() for place in places]
        if not all(place.exists() for place in places):
            return None
        digest = hashlib.sha256()
        for path in [path for place in places for path in _files(place)]:
            digest.update(_digest(path, path.stat().st_mtime_ns, path.stat().st_size))
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        return f'{self.task} {self.arm} seed {self.seed}'


def _read_by(loader: LoaderConfig) -> Iterator[Path]:
    """The files and folders on this machine that a loader reads; of shards their index, which holds their hashes."""
    for place in (loader.source, loader.rationales):
        if place and not place.startswith('hub:'):
            yield Path(find_source(place))
    for stream in named_streams(asdict(loader), '').values():
        if stream.get('local') and not stream.get('remote'):
            yield Path(stream['local'], stream.get('split') or loader.split or '', INDEX)


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]


@lru_cache
def _digest(path: Path, changed_at: int, size: int) -> bytes:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def load_comparison(path: str | Path, overrides: Sequence[str] = (), quiet: bool = False) -> Comparison:
    """Read a comparison's YAML.

    Args:
        path: the YAML.
        overrides: ``key.sub=value``, as on the command line.
        quiet: do not print which tasks and arms are left out. Default: ``False``.
    """
    path = find_yaml(path)
    given = read_yaml(path, 'yamls/compare/superglue.yaml')
    config = merge(path, Comparison, given, parse_overrides(_whole_names(overrides, given)))
    try:
        environment = from_environment(config)
        comparison: Comparison = OmegaConf.to_object(config)  # pyright: ignore[reportAssignmentType]
    except OmegaConfBaseException as error:
        raise UserError(f'{path}: {error.full_key or "config"}: {str(error).strip().splitlines()[0]}') from error
    for key in ('tasks', 'arms'):
        planned = getattr(comparison, key)
        setattr(comparison, key, used(planned))
        if (left := [name for name in planned if planned[name] is None]) and not quiet:
            say(f'{path}: {key}: left out, being null: {", ".join(left)}')
    for key in ('tasks', 'arms', 'seeds'):
        if not getattr(comparison, key):
            raise UserError(f'{path}: {key}: found none; expected at least one')
    if len(set(comparison.seeds)) < len(comparison.seeds):
        raise UserError(f'{path}: seeds: found {comparison.seeds}; expected each once')
    for key in ('tasks', 'arms'):
        for name in getattr(comparison, key):
            if not re.fullmatch(r'\w[\w.-]*', name):
                raise UserError(f'{path}: {key}: found {name!r}; expected a name of letters, digits, ".", "_", "-"')
    if comparison.baseline not in comparison.arms:
        baseline = comparison.baseline
        raise UserError(f'{path}: baseline: found {baseline!r}; {nearest(baseline, comparison.arms)}')
    comparison.base = str(path.parent / comparison.base)
    comparison.environment = environment
    return comparison


def _whole_names(overrides: Sequence[str], given: DictConfig) -> list[str]:
    """``arms.dhrd_0.3=null`` as ``arms[dhrd_0.3]=null``: a dot in the name of a task or an arm parts no keys."""
    found = list(overrides)
    plain: Any = OmegaConf.to_container(given)
    for key in ('tasks', 'arms'):
        names = plain.get(key)
        longest_first = sorted(map(str, names), key=len, reverse=True) if isinstance(names, dict) else ()
        for name in longest_first:
            dotted = rf'^{key}\.{re.escape(name)}(?=[.=])'
            found = [re.sub(dotted, f'{key}[{name}]', override) for override in found]
    return found


def build_cells(comparison: Comparison, where: str | Path = 'comparison', only: CellKey | None = None) -> list[Cell]:
    """Every cell with its config; one seed of everything after another, so that a part of it says something.

    Neither data nor model is touched: that is for :func:`~dhrd_plugin.training.checks.check_limits`.

    Args:
        comparison: of :func:`load_comparison`.
        where: its YAML, for messages. Default: ``comparison``.
        only: the one cell to build, if the comparison has it. Default: all.
    """
    seeds, tasks, arms = comparison.seeds, comparison.tasks, comparison.arms
    for kind, planned in {'tasks': tasks, 'arms': arms}.items():
        for name, key in [(name, key) for name, changes in planned.items() for key in OURS if key in (changes or {})]:
            found = planned[name][key]  # pyright: ignore[reportOptionalSubscript]
            raise UserError(f'{where}: {kind}.{name}.{key}: found {found!r}; expected none, as each cell has its own')
    keys = [(task, arm, seed) for seed in seeds for task in tasks for arm in arms]
    return [_build_cell(comparison, *key, where) for key in keys if only in (None, key)]


def _build_cell(comparison: Comparison, task: str, arm: str, seed: int, where: str | Path) -> Cell:
    # What comes from the environment does so in the cell as well, and is not written there either.
    variables = {k: text for k, text in getattr(comparison, 'environment', {}).items() if not _OTHER.search(text)}
    typed = as_typed(asdict(comparison), variables)
    folder = Path(typed['output_dir']) / 'cells' / task / arm / str(seed)
    ours = {
        'run_name': f'{task}-{arm}-{seed}',
        'output_dir': str(folder),
        'seed': seed,
        'callbacks': {'drop_reasoning_head': {'output_dir': str(folder / EXPORT)}},
        'loggers': {'in_memory': {}},
    }
    layers = {
        f'{where}: tasks.{task}': typed['tasks'][task] or {},
        f'{where}: arms.{arm}': typed['arms'][arm] or {},
        f'{where}: {task} {arm}': ours,
    }
    config = load_config(comparison.base, layers=layers)
    if not used(config.eval_loaders):
        raise UserError(f'{where}: tasks.{task}.eval_loaders: found none; expected the rows to compare on')
    if config.save_folder is not None:  # its own: wherever it is, another cell would go on from its checkpoints
        config.save_folder = str(folder / CHECKPOINTS)
    return Cell(task, arm, seed, config)


def write_plan(comparison: Comparison) -> None:
    """Write ``comparison.yaml``, of which the report is made."""
    settings = OmegaConf.create(written(comparison))
    files.write_bytes(Path(comparison.output_dir) / PLAN, OmegaConf.to_yaml(settings).encode())


def check_targets(comparison: Comparison, cells: Sequence[Cell], where: str | Path) -> None:
    """Refuse to write a comparison, and these cells of it, onto what is not theirs, or where that cannot be.

    Args:
        comparison: of :func:`load_comparison`.
        cells: to be run.
        where: the comparison's YAML.
    """
    key, folder = f'{where}: output_dir', Path(comparison.output_dir)
    read = {'the YAML of the comparison': find_yaml(where), 'its base': comparison.base}
    files.check_into(folder, key)
    files.check_file(folder / PLAN, key, 'a comparison', lambda path: bool(read_plan(path)), read)
    if not (folder / PLAN).exists():
        pictures = [path.name for path in folder.glob('*.png')]
        for name in ('cells', RESULTS, 'report.html', 'report.md', *pictures):
            if (folder / name).exists():
                raise UserError(f'{key}: {folder}: holds {name} and no {PLAN}; expected a comparison or another folder')
    for cell in cells:
        files.check_apart(cell.folder, f'{where}: {cell}', inputs(cell.config))
        check_run(cell.config)


def check_plan(comparison: Comparison, where: str | Path) -> None:
    """Refuse to report on a plan other than the one that was run: a change must not be left out in silence.

    Args:
        comparison: of :func:`load_comparison`.
        where: its YAML, for messages.
    """
    path = Path(comparison.output_dir) / PLAN
    stored, _ = read_plan(path)
    for key in ('tasks', 'arms', 'baseline', 'average', 'seeds'):
        wanted, found = (
            value if isinstance(value, str | bool) else [*value]
            for value in (getattr(comparison, key), stored.get(key, True))  # an older plan has no ``average``
        )
        if found != wanted:
            raise UserError(
                f'{path}: {key}: found {found!r}, where {where} has {wanted!r} now; '
                'run it without --report, which trains only what is missing'
            )
