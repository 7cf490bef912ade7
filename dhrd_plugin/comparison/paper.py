"""The paper's own figures (arXiv:2509.21487v2), to stand beside those of a run on one of its backbones."""

import re
from dataclasses import dataclass

TASKS = ('boolq', 'cb', 'copa', 'multirc', 'rte', 'wic', 'wsc')
BACKBONES = ('Llama-3.1-8B', 'Qwen3-8B', 'Llama-3.2-3B', 'Qwen3-4B')


@dataclass(frozen=True)
class Setting:
    """A line of Table 1, in percent."""

    backbone: str  # one of BACKBONES
    name: str  # as the paper calls it
    # of each of TASKS; two where the task has two metrics (CB: macro-F1, accuracy; MultiRC: F1a, EM)
    values: tuple[tuple[float, ...], ...]
    average: float  # of the seven scores, where two metrics count as their mean
    relative: float | None = None  # the average over that of the pooled baseline, minus 1, in percent


def _line(backbone: str, name: str, values: str, average: float, relative: float | None = None) -> Setting:
    cells = tuple(tuple(float(part) for part in cell.split('/')) for cell in values.split())
    return Setting(backbone, name, cells, average, relative)


# Table 1: SuperGLUE, one run a setting.
TABLE1 = (
    _line('Llama-3.1-8B', 'pooled baseline', '90.7 81.9/90.0 93.8 88.9/62.9 91.4 74.8 91.5', 86.29),
    _line('Llama-3.1-8B', 'DHRD alpha=1 beta=1', '91.1 89.0/94.8 95.4 89.0/63.7 92.2 74.6 91.1', 87.52, 1.43),
    _line('Qwen3-8B', 'pooled baseline', '89.4 83.5/93.2 93.8 88.2/62.0 91.9 75.1 89.0', 86.09),
    _line('Qwen3-8B', 'DHRD alpha=1 beta=1', '90.5 90.8/95.6 93.2 88.5/62.5 91.9 76.6 89.7', 87.23, 1.32),
    _line('Llama-3.2-3B', 'pooled baseline', '89.0 78.6/88.8 72.2 83.5/49.8 84.3 68.1 77.4', 77.34),
    _line('Llama-3.2-3B', 'DHRD alpha=1 beta=1', '89.2 73.8/87.2 89.2 85.9/55.3 87.7 73.0 80.8', 81.57, 5.47),
    _line('Qwen3-4B', 'pooled baseline', '88.9 84.3/91.6 92.4 87.7/62.0 90.4 71.4 85.6', 84.50),
    _line('Qwen3-4B', 'DHRD alpha=0.5 beta=1', '89.5 84.4/92.0 92.8 88.1/62.4 90.8 71.4 87.4', 85.05, 0.65),
)

# Table 2: what the gain comes from; average, and relative to DHRD in percent.
CONTROLS: dict[str, dict[str, tuple[float | None, float | None]]] = {
    'Llama-3.1-8B': {
        'ConsistentReasoningLabel': (87.52, None),
        'OnlyLabel': (85.99, -1.75),
        'ShuffleReasoning': (82.54, -5.70),
        'ShuffleReasoningLabel': (45.09, -48.48),
    },
    'Llama-3.2-3B': {
        'ConsistentReasoningLabel': (81.57, None),
        'OnlyLabel': (None, -3.84),
        'ShuffleReasoning': (None, -20.24),
        'ShuffleReasoningLabel': (None, -45.27),
    },
}

# Table 3: averages by (alpha, beta); beta 0 is the reasoning head alone, decoding a chain of thought.
ALPHAS: dict[str, dict[tuple[float, float], float]] = {
    'Llama-3.1-8B': {(0.5, 1.0): 87.28, (1.0, 1.0): 87.52, (1.0, 0.5): 86.44, (1.0, 0.0): 71.65},
    'Llama-3.2-3B': {(0.5, 1.0): 79.95, (1.0, 1.0): 81.57},
    'Qwen3-4B': {(0.5, 1.0): 85.05, (1.0, 1.0): 83.61, (1.0, 0.5): 82.67},
    'Qwen3-8B': {(1.0, 1.0): 87.23, (1.0, 0.0): 78.14},
}


def backbone(model: str) -> str | None:
    """Which of the paper's backbones a model is, by the last part of its name; None where it is no such.

    Case does not matter, nor a suffix such as ``-Instruct`` or ``-Instruct-2507``, nor ``Meta-`` in front.
    """
    last = re.split(r'[/:]', model.rstrip('/'))[-1]
    for name in BACKBONES:
        if re.fullmatch(rf'(meta-)?{re.escape(name)}(-instruct(-\d+)?)?', last, re.IGNORECASE):
            return name
    return None
