"""One process, two DDP ranks and two FSDP2 ranks train the same model and export it; FSDP1 needs a GPU."""

import json
from pathlib import Path

import pytest
import torch
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from elsewhere import load_elsewhere
from forks import run_ranks
from parallel_runs import CASES, HALF, steps_of, write_inputs
from safetensors.torch import load_file
from tiny import triplet

from dhrd_plugin.errors import UserError
from dhrd_plugin.export.from_checkpoint import export_checkpoint
from dhrd_plugin.training.fsdp import build_fsdp, fsdp_version

SHARDED = ('ddp', 'fsdp2', 'fsdp2-full')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Every case on every layout."""
    root = tmp_path_factory.mktemp('runs')
    write_inputs(root)
    some = [*map('/'.join, FULL), 'fsdp2-summed/tied', *(f'fsdp2/{case}' for case in HALF)]
    launch(root, 1, *(f'one/{case}' for case in (*CASES, *HALF)))
    launch(root, 2, *(f'{layout}/{case}' for layout in ('ddp', 'fsdp2') for case in CASES), *some)
    return root


def launch(root: Path, ranks: int, *names: str) -> None:
    run_ranks(ranks, Path(__file__).parents[1] / 'parallel_runs.py', root, *names, timeout=900)


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """What callbacks remembered, and the folder of the runs."""
    root = tmp_path_factory.mktemp('stopped')
    write_inputs(root)
    run_ranks(2, Path(__file__).parents[1] / 'stopped_runs.py', root)
    return root, json.loads((root / 'found.json').read_text())


def test_stoppers_remember_out_of_shards(stopped):
    _, found = stopped
    assert found['early'] == [8, 8] and found['threshold'] == [2, 2]


def test_shards_know_nothing_of_a_callback_that_is_new(stopped):
    root, found = stopped
    assert found['new'] == [2, 4]
    assert (root / 'fsdp2' / 'untied' / 'slim' / 'model.safetensors').is_file()


def test_a_rank_without_a_labelled_row_has_the_metrics_of_all(stopped):
    root, found = stopped
    assert found['half'] == 2
    summary = json.loads((root / 'ddp' / 'untied' / 'summary.json').read_text())
    assert summary['best']['batch'] == 2 and summary['metrics']['val'] == {
        'MulticlassAccuracy': summary['best']['value']
    }


def series(root: Path, layout: str, case: str) -> dict[str, list[float]]:
    return json.loads((root / layout / case / 'series.json').read_text())


def compared(root: Path):
    return [(layout, case) for layout in SHARDED for case in CASES if (root / layout / case).exists()]


def test_the_losses_are_those_of_one_process_and_the_metrics_exactly(runs):
    assert len(compared(runs)) == 2 * len(CASES) + 2
    for layout, case in compared(runs):
        found, expected = series(runs, layout, case), series(runs, 'one', case)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            if name.startswith('loss/'):
                assert len(values) == steps_of(case)
                torch.testing.assert_close(found[name], values, rtol=1e-5, atol=0, msg=f'{layout} {case} {name}')
            else:
                assert found[name] == values, (layout, case, name)
    losses = series(runs, 'one', 'tied')['loss/train/classification']
    assert losses[-1] < 0.8 * losses[0]  # it learns: the agreement is not one of standing still


@pytest.mark.parametrize('case', HALF)
def test_a_backbone_in_half_precision_trains_beside_a_head_in_fp32(runs, case):
    found, expected = (series(runs, layout, case) for layout in ('fsdp2', 'one'))
    assert found['loss/train/total'] == pytest.approx(expected['loss/train/total'], rel=0.02)
    weights = load_file(runs / 'fsdp2' / case / 'slim' / 'model.safetensors')
    assert {str(value.dtype) for name, value in weights.items() if 'classifier' in name} == {'torch.float32'}
    assert weights['backbone.embed_tokens.weight'].dtype == torch.bfloat16


def test_without_the_average_gloo_sums_and_clipping_shows_it(runs):
    """What ``average_gradients`` mends, pytorch issue 162338; the runs above agree because of it."""
    summed, expected = (series(runs, layout, 'tied')['loss/train/total'] for layout in ('fsdp2-summed', 'one'))
    far = max(abs(a - b) for a, b in zip(summed, expected, strict=True))
    assert far > 1e-3 if torch.__version__ < (2, 11) else far < 1e-5  # the gloo of later ones averages by itself


def test_the_exports_are_the_same_model_and_hold_no_other_head(runs):
    for layout, case in compared(runs):
        found, expected = (load_file(runs / name / case / 'slim' / 'model.safetensors') for name in (layout, 'one'))
        assert found.keys() == expected.keys()
        assert not [name for name in found if 'lm_head' in name or 'lora' in name]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=f'{layout} {case} {name}')


def test_the_exports_load_where_the_package_cannot_be_imported(runs, tmp_path):
    rows = [triplet(i, 1 + i % 7, None) for i in range(12)]
    texts, labels = [row['input_text'] for row in rows], torch.zeros(12, dtype=torch.long)
    for layout in ('one', 'ddp', 'fsdp2'):
        for case in CASES:
            (tmp_path / f'{layout} {case}').symlink_to(runs / layout / case)
    found = load_elsewhere(tmp_path, texts, labels)
    logits = {name: outputs['logits'] for name, outputs in found.items()}
    for case in CASES:
        for layout in ('ddp', 'fsdp2'):
            torch.testing.assert_close(logits[f'{layout} {case}'], logits[f'one {case}'], rtol=0, atol=1e-5)


FULL = [('fsdp2-full', case) for case in ('tied', 'untied-lora')]


@pytest.mark.parametrize(
    ('layout', 'case'), [*((layout, case) for layout in ('one', 'ddp', 'fsdp2') for case in CASES), *FULL]
)
def test_a_checkpoint_full_or_sharded_exports_to_the_same_bytes(runs, layout, case, tmp_path):
    folder = runs / layout / case
    checkpoint = folder / 'checkpoints' / 'latest-rank0.pt'
    assert checkpoint.resolve().is_dir() == (layout == 'fsdp2')
    export_checkpoint(str(checkpoint), tmp_path / 'slim')
    weights = tmp_path / 'slim' / 'model.safetensors'
    assert weights.read_bytes() == (folder / 'slim' / 'model.safetensors').read_bytes()
    if layout == 'one':
        assert weights.stat().st_size < checkpoint.resolve().stat().st_size / 2


@pytest.mark.parametrize(
    ('settings', 'kind'),
    [({'version': 1, 'sharding_strategy': 'FULL_SHARD'}, FSDPConfig), ({'version': 2}, FSDP2Config), ({}, FSDPConfig)],
)
def test_the_version_stands_in_the_yaml(settings, kind, monkeypatch):
    monkeypatch.delenv('FSDP_VERSION', raising=False)
    assert isinstance(build_fsdp(settings), kind)
    monkeypatch.setenv('FSDP_VERSION', '2')
    assert fsdp_version(settings) == settings.get('version', 2)


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        ({'version': 3}, 'fsdp_config.version: found 3; expected 1 or 2'),
        ({'version': 2, 'sharding_strategy': 'FULL_SHARD'}, 'sharding_strategy: unknown key of FSDP2Config'),
        ({'version': 1, 'mixed_precison': 'PURE'}, 'mixed_precison: unknown key of FSDPConfig; did you mean'),
    ],
)
def test_keys_that_the_version_does_not_have_are_refused(settings, expected):
    with pytest.raises(UserError) as error:
        build_fsdp(settings)
    assert expected in str(error.value)
