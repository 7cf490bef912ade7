"""Command lines that no verb can do anything with."""

import pytest


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['trian'], "invalid choice: 'trian'"),
        (['train', 'no.yaml'], 'no.yaml: no such file'),
        (['predict'], 'the following arguments are required: model'),
        (['predict', 'nowhere', 'a text'], 'nowhere: expected a folder with config.json'),
        (['predict', 'nowhere', 'a text', '--input', 'a.csv'], '--input: a.csv: found beside texts; expected one or'),
        (['predict', 'nowhere', __file__], 'found a place that holds texts; expected a text, or --input'),
        (['predict', 'nowhere', 'a text', '--batch-size', '0'], "--batch-size: found '0'; expected a whole number"),
        (['evaluate', 'nowhere', 'rte'], 'nowhere: expected a folder with config.json'),
        (['export', 'nowhere.pt', 'out'], 'nowhere.pt: no such file'),
        (['export', 'nowhere.pt', 'out', '--dtype', 'fp8'], "--dtype: invalid choice: 'fp8'"),
        (['prepare', '--workers', 'many'], "--workers: found 'many'; expected a whole number"),
        (['inspect', 'nowhere'], 'nowhere'),
        (['compare', 'no.yaml'], 'no.yaml: no such file'),
        (['rationales', 'rte'], 'the following arguments are required: --task'),
        (['show-batch', 'no.yaml'], 'no.yaml: no such file'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_it_is_refused_in_one_line(refused, arguments, words):
    assert words in refused(*arguments)
