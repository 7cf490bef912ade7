"""Which way imports run: from the command down to the leaves, never back."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'dhrd_plugin'
# From the ground up: a module imports from its own floor and those below it. The first part of a name, or the name.
FLOORS = [
    {'arguments', 'errors', 'redact', 'ranks', 'files', 'pictures', 'times', 'problem_type'},
    {'calibration', 'losses', 'metrics', 'data.triplet'},
    {'streams'},
    {'models'},
    {'data'},
    {'export', 'checkpoints', 'teacher'},
    {'algorithms', 'callbacks'},
    {'predict', 'evaluate', 'training', 'show_batch', 'llmfoundry'},
    {'comparison'},
]
# The method outlives its host: these need torch and transformers alone.
WITHOUT_COMPOSER = [
    'losses',
    'metrics',
    'models.network',
    'models.heads',
    'models.padding_free',
    'models.slim',
    'models.build',
    'data.triplet',
    'data.collator',
    'data.rationale_collator',
    'export.write',
    'export.load',
    'predict',
    'evaluate',
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob('*.py')}
# The package's own list of names, and the command's table of verbs, name modules without importing them.
ROOMS = [name for name in MODULES if name not in ('', 'cli', '__main__')]


def imported(name: str) -> set[str]:
    """The package's modules that a module imports anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('dhrd_plugin'):
            module = (node.module or '').removeprefix('dhrd_plugin').removeprefix('.')
            for alias in node.names:
                inner = f'{module}.{alias.name}'.removeprefix('.')
                found.add(inner if inner in MODULES else module)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix('dhrd_plugin.') for alias in node.names if 'dhrd_plugin' in alias.name}
        elif isinstance(node, ast.ImportFrom) and node.level:  # models/slim.py, which travels with an export
            found.add(f'{name.rpartition(".")[0]}.{node.module}')
    return found - {name}


def floor(name: str) -> int:
    exact = [number for number, rooms in enumerate(FLOORS) if name in rooms]
    return (exact or [number for number, rooms in enumerate(FLOORS) if name.split('.')[0] in rooms])[0]


def test_no_import_goes_round():
    graphlib.TopologicalSorter({name: imported(name) for name in ROOMS}).prepare()  # a CycleError names the circle


@pytest.mark.parametrize('name', ROOMS)
def test_imports_run_down(name):
    below = {module for module in imported(name) if module not in ('cli', '')}
    assert not [module for module in below if floor(module) > floor(name)]
    # A command's module takes from cli what all verbs do alike.
    assert 'cli' not in imported(name) or 'main' in MODULES[name].read_text()


def test_the_command_itself_imports_only_errors():
    assert imported('cli') == {'errors', ''}  # and the version


def test_the_method_needs_no_composer_and_the_plugin_no_application():
    """Named one by one, so that the first that does is told."""
    code = (
        'import importlib, sys\n'
        f'for name in {WITHOUT_COMPOSER}:\n'
        "    importlib.import_module(f'dhrd_plugin.{name}')\n"
        "    assert 'composer' not in sys.modules, name\n"
        'from dhrd_plugin import AuxiliaryReasoningLoss, DropReasoningHead, apply_reasoning_head\n'
        "assert not [name for name in sys.modules if name.startswith('dhrd_plugin.training')]"
    )
    subprocess.run([sys.executable, '-c', code], check=True)
