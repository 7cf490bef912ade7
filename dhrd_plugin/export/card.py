"""The model card of an export: what it is, how it is loaded, how good it was, from which data and YAML."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from dhrd_plugin.export.int8 import Difference

PAPER = 'arXiv:2509.21487'
DROPPED = f'Trained by Dual-Head Reasoning Distillation ({PAPER}); the reasoning head is dropped.'  # in every card
_INT8 = '\n## int8\n\n'
Metrics = Mapping[str, Mapping[str, float]]  # by evaluation set and name


def model_card(
    metadata: Mapping[str, Any],
    metrics: Metrics | None,
    remote_code: bool,
    best: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """The text of a ``README.md`` for the Hugging Face hub.

    Args:
        metadata: of the trained model; ``metadata['dhrd']`` may hold ``label_names``, ``task``,
            ``config`` (the YAML) and ``data`` (fingerprints by loader).
        metrics: by evaluation set and name. Default: none are known.
        remote_code: whether the folder holds code of its own to load with.
        best: see :func:`~dhrd_plugin.export.write.write_slim`. Default: the weights are the last.
        calibration: likewise. Default: none.
    """
    settings = metadata.get('dhrd', {})
    data = ModelCardData(library_name='transformers', pipeline_tag='text-classification', tags=['composer', 'dhrd'])
    sections = [
        f'---\n{data.to_yaml()}\n---',
        '# Slim classifier',
        DROPPED,
        _usage(remote_code, bool(settings.get('multi_label'))),
        _labels(settings),
        _metrics(metrics, best),
        _calibration(calibration),
        _fingerprints(settings.get('data')),
        _config(settings.get('config')),
    ]
    return '\n\n'.join(section for section in sections if section) + '\n'


def _usage(remote_code: bool, multi_label: bool) -> str:
    option = ', trust_remote_code=True' * remote_code + ', top_k=None' * multi_label
    return (
        '```python\n'
        'from transformers import pipeline\n\n'
        f"classify = pipeline('text-classification', model='FOLDER'{option})\n"
        '```'
    ) + '\n\nA text has the labels whose score is at least one half.' * multi_label


def _labels(settings: Mapping[str, Any]) -> str:
    names = settings.get('label_names')
    prompt = (settings.get('task') or {}).get('prompt')
    several = ', any number of them to a text' * bool(settings.get('multi_label'))
    text = '' if not names else f'Labels{several}: {", ".join(f"`{name}`" for name in names)}.'
    return text if not prompt else f'{text}\n\nInput text:\n\n```\n{prompt}\n```'


def _metrics(metrics: Metrics | None, best: Mapping[str, Any] | None) -> str:
    # Not the hub's model-index: it asks for a data set of the hub to each value, and shows no table to readers here.
    rows = [
        f'| {label} | {name} | {value:.4f} |'
        for label, values in (metrics or {}).items()
        for name, value in values.items()
    ]
    if not rows:
        return ''
    heading = ['## Evaluation', '']
    if best:
        heading += [
            f'The weights after batch {best["batch"]} (epoch {best["epoch"]}), the best by {best["metric"]} of '
            f'{best["dataloader_label"]}; these are its metrics.',
            '',
        ]
    return '\n'.join([*heading, '| set | metric | value |', '|---|---|---|', *rows])


def _calibration(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ''
    rows = f'{found["rows"]} rows' + (f' of {found["rows_of"]}' if 'rows_of' in found else '')
    return (
        f'## Calibration\n\nThe logits are divided by the temperature {found["temperature"]:.4f}, fitted on {rows}. On '
        f'these rows the expected calibration error was {found["ece_before"]:.4f} and is {found["ece_after"]:.4f}.'
    )


def with_int8(card: str, found: Difference) -> str:
    """A card with a section on the int8 ONNX file at its end, in the place of an earlier one.

    Args:
        card: of :func:`model_card`.
        found: of :func:`~dhrd_plugin.export.int8.compare`.
    """
    text = (
        f'`model-int8.onnx` beside `model.onnx`, on {found.rows} rows of {found.rows_of}: {found.same:.1%} of the '
        f'labels are the same, and probabilities are up to {found.apart:.4f} apart.'
    )
    if found.accuracy:
        text += f' Accuracy on them: {found.accuracy[1]:.4f} in int8, {found.accuracy[0]:.4f} in fp32.'
    return f'{card.partition(_INT8)[0]}{_INT8}{text}\n'


def _fingerprints(data: Mapping[str, str] | None) -> str:
    rows = [f'- {loader}: `{value}`' for loader, value in (data or {}).items()]
    intro = 'SHA-256 of the indexes of the shards, which hold the hashes of the shards:'
    return '' if not rows else '\n'.join(['## Data', '', intro, '', *rows])


def _config(config: str | None) -> str:
    return '' if not config else f'## Configuration\n\n```yaml\n{config}```'
