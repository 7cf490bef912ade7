"""The page of a comparison, as a browser shows it, and the Markdown beside it."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from browser import look_at, open_browser
from made import ARMS, SKILL, TASKS, line, make, write
from matplotlib.image import imread

from dhrd_plugin.comparison.page import write_report

CURVES = {'loss-train-classification', 'loss-train-reasoning', 'dhrd-alpha', 'dhrd-grad-cosine', 'dhrd-grad-norm-ratio'}
PICTURES = {'scores', 'differences', *(f'curve-{name}' for name in CURVES)}
NASTY = '<script>alert(1)</script> & "q" | $x$ `y` *z* [w](v)'


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """The report of three tasks, five arms and three seeds."""
    folder = make(tmp_path_factory.mktemp('report'))
    return folder, write_report(folder)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp('profile')) as found:
        yield found


def answer(folder: Path) -> str:
    return unescape(re.search('<p class="answer">(.*?)</p>', (folder / 'report.html').read_text())[1])


def reported(folder: Path) -> tuple[str, str]:
    write_report(folder)
    return (folder / 'report.html').read_text(), (folder / 'report.md').read_text()


@pytest.mark.parametrize('width', [1100, 400])
def test_a_browser_shows_the_page_whole(report, browser, tmp_path, width):
    shot = tmp_path / 'page.png'
    shot.write_bytes(look_at(browser, report[0] / 'report.html', width))
    assert browser.get_log('browser') == []
    assert browser.execute_script('return performance.getEntriesByType("resource").length') == 0
    assert browser.execute_script('return document.documentElement.scrollWidth') <= width
    figures = browser.execute_script(
        'return [...document.querySelectorAll("figure svg")].map(svg => {'
        ' const box = svg.getBoundingClientRect(), text = svg.querySelectorAll("text").length;'
        ' return [box.left, box.right, box.height, text, svg.getAttribute("aria-label")]})'
    )
    assert len(figures) == len(PICTURES)
    for left, right, height, text, label in figures:
        assert left >= 0 and right <= width and right - left > 300 and height > 150
        assert text > 5 and 'dhrd_0.3' in label
    pixels = imread(shot)
    assert pixels.shape[1] == width and pixels.shape[0] > 3000
    assert np.ptp(pixels[..., :3].reshape(-1, 3), axis=0).min() > 0.9  # neither blank nor grey


def test_text_in_a_figure_lies_within_it_and_on_no_other(report, browser):
    look_at(browser, report[0] / 'report.html', 1100)
    overlaps = browser.execute_script("""
        const found = [];
        for (const svg of document.querySelectorAll('figure svg')) {
            const frame = svg.getBoundingClientRect();
            const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
            boxes.forEach(([text, a], i) => {
                if (a.left < frame.left - 2 || a.right > frame.right + 2) found.push(['outside', text]);
                for (const [other, b] of boxes.slice(i + 1)) {
                    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                    if (x > 1 && y > 4) found.push([text, other]);
                }
            });
        }
        return found""")
    assert overlaps == []


@pytest.fixture(scope='module')
def two_sets(tmp_path_factory):
    """Three tasks, two of them evaluated out of distribution too, where half of the answers are flipped."""
    folder = make(tmp_path_factory.mktemp('two'), seeds=(17, 18), curves=False)
    lines = [json.loads(text) for text in (folder / 'results.jsonl').read_text().splitlines()]
    for found in [found for found in lines if found['task'] != 'cb']:
        guesses = [guess if index % 2 else 0 for index, guess in enumerate(found['predictions'])]
        again = [found[key] for key in ('task', 'arm', 'seed', 'labels')]
        more = {'names': found['label_names'], 'metrics': found['task_metrics'], 'groups': found['groups']}
        lines.append(line(*again, [0] * len(guesses) if found['arm'] == 'dhrd_1' else guesses, split='ood/far', **more))
    (folder / 'results.jsonl').write_text(''.join(f'{json.dumps(found)}\n' for found in lines))
    return folder, write_report(folder)


def test_a_further_evaluation_set_has_its_own_tables_and_pictures(two_sets, browser, tmp_path):
    folder, paths = two_sets
    names = {path.name for path in paths} - {'report.html', 'report.md'}
    assert names == {'scores.png', 'differences.png', 'scores-2-ood-far.png', 'differences-2-ood-far.png'}
    look_at(browser, folder / 'report.html', 1100)
    section = 'return [...document.querySelectorAll("section")].find(s => s.querySelector("h2").textContent == "{}").{}'
    far = section.format('Evaluated on ood/far', 'innerText')
    text = browser.execute_script(far)
    assert 'No part of the averages.' in text and 'cb' not in text
    assert browser.execute_script(section.format('Evaluated on ood/far', 'querySelectorAll("figure").length')) == 2
    assert len(browser.execute_script(section.format('Evaluated on ood/far', 'innerText')).splitlines()) > 30
    constant = re.search(r'Constant classifiers.*?dhrd_1\s+2 of 2\s+2 of 2\s', text, re.DOTALL)
    assert constant and 'Constant classifiers' not in browser.execute_script(section.format('Scores', 'innerText'))
    assert answer(folder).startswith('Compared with pooled, on average over cb, multirc and rte')


def test_scores_stand_above_what_takes_no_classifier(two_sets):
    text = (two_sets[0] / 'report.html').read_text()
    rows = re.findall(r'<th scope="row">(?:majority|uniform) answer</th>(.*?)</tr>', text)
    labels = {
        task: next(
            json.loads(found)['labels'] for found in (two_sets[0] / 'results.jsonl').open() if f'"{task}"' in found
        )
        for task in TASKS
    }
    most = {task: f'{100 * np.bincount(found).max() / len(found):.1f}' for task, found in labels.items()}
    cells = [re.findall('<td>(.*?)</td>', row) for row in rows]
    assert cells[0][:3] == [f'{most["cb"]}\xa0accuracy', f'{most["multirc"]}\xa0accuracy', most['rte']]
    assert cells[1][:3] == ['33.3\xa0accuracy', '50.0\xa0accuracy', '50.0'] and len(cells) == 4
    assert cells[2] == cells[0][1:3] and cells[3] == cells[1][1:3]


def test_too_few_rows_are_named(tmp_path):
    lines = [line('a', 'pooled', 1, [0, 1] * 20, [0, 1] * 15 + [1, 1] * 5)]
    lines += [line('a', 'arm', 1, [0, 1] * 20, [0, 0] + [0, 1] * 15 + [0, 1, 1, 1, 1, 1, 1, 1])]
    for text in reported(write(tmp_path, lines)):
        assert 'a: 40 rows and 1 seed are too few to show a difference of the size seen, in points: arm' in text
        assert 'Smallest difference that would be shown in 80 % of cases, in points' in text


def test_a_difference_that_no_arm_can_reach_is_not_given_in_points(tmp_path):
    lines = [line('a', 'pooled', seed, [0, 1] * 20, [0, 0] * 20) for seed in (1, 2)]
    lines += [line('a', 'arm', seed, [0, 1] * 20, [seed % 2, 1] * 20) for seed in (1, 2)]  # +0 and +50 points
    for text in reported(write(tmp_path, lines)):
        assert 'arm +25.0, where it takes more than 100.' in text.replace('\xa0', ' ')


def test_the_page_is_one_file_with_tables_that_name_their_cells(report):
    text = (report[0] / 'report.html').read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text) and '<script' not in text and 'url(http' not in text
    assert "default-src 'none'" in text
    assert text.count('<table>') == text.count('<caption>') > 5
    assert '<th scope="col">arm</th>' in text and '<th scope="row">dhrd_0.3</th>' in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', text)) <= set(ids)


def test_what_is_written_is_what_is_returned(report):
    folder, paths = report
    assert {path.name for path in paths} == {'report.html', 'report.md', *(f'{name}.png' for name in PICTURES)}
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} | {
        'comparison.yaml',
        'results.jsonl',
    }
    for path in paths:
        assert path.suffix != '.png' or path.read_bytes().startswith(b'\x89PNG')
    markdown = (folder / 'report.md').read_text()
    assert set(re.findall(r'\]\((\S+)\.png\)', markdown)) == PICTURES
    for block in re.findall(r'(?:^\|.*\n)+', markdown, re.MULTILINE):  # every row has as many cells
        assert len({len(re.findall(r'(?<!\\)\|', row)) for row in block.splitlines()}) == 1


def test_the_same_results_give_the_same_bytes(report, tmp_path):
    again = write_report(make(tmp_path))
    for path, other in zip(report[1], again):
        assert path.read_bytes() == other.read_bytes(), path.name


def test_the_answer_names_gains_and_losses(report):
    found = answer(report[0])
    assert found.startswith('Compared with pooled, on average over cb, multirc and rte: a gain for dhrd_0.3 (+')
    assert '; a loss for shuffled_0.3 (\N{MINUS SIGN}' in found and found.endswith('; 3 seeds, 95 % intervals.')
    assert re.search(r'; no difference shown for dhrd_1 \(.*\) and dhrd_1_to_0 \(', found)
    assert set(verdicts((report[0] / 'report.html').read_text())) == {'gain', 'loss', 'no difference shown'}


def test_no_gain_is_spoken_of_where_an_interval_spans_zero(tmp_path):
    arms = {arm: ARMS[arm] for arm in ('pooled', 'dhrd_0.3')}
    html, markdown = reported(make(tmp_path, skill={**SKILL, 'dhrd_0.3': 0.82}, arms=arms, curves=False))
    assert 'no difference shown for dhrd_0.3' in answer(tmp_path) and 'gain' not in answer(tmp_path)
    assert verdicts(html) and verdicts(html) == verdicts(markdown)


def verdicts(text: str) -> list[str]:
    """The verdict on each difference in a report's tables; each must be what its interval allows."""
    found = re.findall(r'\[([^],]+),\s([^],]+)\] (gain|loss|no difference shown)', text)
    for low, high, verdict in found:
        low, high = (float(value.replace('\N{MINUS SIGN}', '-')) for value in (low, high))
        assert verdict == 'no difference shown' or (low >= 0 if verdict == 'gain' else high <= 0)
    return [verdict for *_, verdict in found]


def test_one_seed_and_two_tasks(tmp_path):
    tasks = {name: TASKS[name] for name in ('cb', 'rte')}
    html, _ = reported(make(tmp_path, tasks=tasks, seeds=(17,), curves=False))
    assert answer(tmp_path).endswith('; one seed, so the 95 % intervals are over rows alone.')
    assert 'With one seed the interval is over rows alone' in html and '1 seed, 95 % interval' in html
    assert 'Radar' not in html and 'Dots with intervals' in html
    assert 'average' in html and 'The paper on' not in html


def test_settings_are_not_averaged(tmp_path):
    folder = make(tmp_path, seeds=(17,), curves=False)
    plan = tmp_path / 'comparison.yaml'
    plan.write_text(f'{plan.read_text()}average: false\n')
    for text in reported(folder):
        assert '<th scope="col">average' not in text and '| average |' not in text and 'verdict |' not in text
        assert 'Radar' not in text and 'Dots with intervals' in text and 'gain' in text
    assert answer(tmp_path).startswith('Each of cb, multirc and rte is compared with pooled by itself, below')


def test_a_partial_comparison_says_so(tmp_path):
    gone = [('rte', 'dhrd_1', seed) for seed in (17, 18, 19)] + [('cb', 'pooled', 17)]
    html, markdown = reported(make(tmp_path, leave_out=gone, curves=False))
    for text in (html, markdown):
        assert '4 of 45 cells missing: cb pooled seed 17, rte dhrd_1 seed 17' in text
        assert '41 of 45 present, 4 missing, 0 extra' in text
        assert 'Averages are over cb and multirc, which all arms' in text and 'rte is left out' in text
        assert re.search(r'\(2\sseeds\)', text)


@pytest.mark.parametrize('cells', [0, 1])
def test_a_comparison_that_has_hardly_begun(tmp_path, cells):
    plan = {'baseline': 'pooled', 'tasks': {'a': {}}, 'arms': {'pooled': {}, 'arm': {}}, 'seeds': [1]}
    lines = [line('a', 'arm', 1, [0, 1, 1], [0, 1, 0])][:cells]
    html, _ = reported(write(tmp_path, lines, plan))
    assert answer(tmp_path).startswith('Nothing can be said yet')
    assert f'{2 - cells} of 2 cells missing' in html
    assert ('66.7 [13.4' in html) == bool(cells)


def test_a_classifier_that_tells_no_rows_apart_is_named(tmp_path):
    lines = [
        line('a', 'pooled', 1, [0, 1, 1, 0], [1, 1, 1, 1]),
        line('a', 'arm', 1, [0, 1, 1, 0], [0, 1, 1, 1]),
        line('one class', 'pooled', 1, [1, 1], [1, 1]),
    ]
    for text in reported(write(tmp_path, lines)):
        assert 'The same label for every row, whatever it says: a pooled seed 1.' in text


def test_everything_from_the_data_is_escaped(tmp_path, browser):
    labels, more = (
        [0, 1, 1, 0],
        {'model': NASTY, 'series': {'dhrd/<b>': [[1, 2.0], [2, 1.0]]}, 'versions': {NASTY: '1'}},
    )
    lines = [line(NASTY, arm, 1, labels, labels, names=(NASTY, 'b'), **more) for arm in ('pooled', NASTY)]
    html, markdown = reported(write(tmp_path, lines))
    assert '<script' not in html and '<b>' not in html
    assert '<script' not in re.sub(r'```yaml.*?```', '', markdown, flags=re.DOTALL)
    look_at(browser, tmp_path / 'report.html', 400)
    assert browser.get_log('browser') == []
    assert browser.execute_script('return document.documentElement.scrollWidth') <= 400
    assert NASTY in browser.execute_script(
        'return document.querySelector("tbody th + td").closest("table").textContent'
    )
    assert NASTY in browser.execute_script('return document.querySelector("figure svg").textContent')


@pytest.mark.parametrize('model', ['meta-llama/Llama-3.1-8B', 'some/Qwen3-4B-Instruct-2507'])
def test_the_papers_figures_stand_beside_those_on_its_backbones(tmp_path, model):
    tasks = {name: TASKS[name] for name in ('cb', 'rte')}
    html, _ = reported(make(tmp_path, tasks=tasks, seeds=(17,), model=model, curves=False))
    expected = {'meta-llama/Llama-3.1-8B': '81.9/90.0', 'some/Qwen3-4B-Instruct-2507': '84.3/91.6'}
    assert f'<th scope="row">paper: pooled baseline</th><td>{expected[model]}</td>' in html
    assert 'here: dhrd_0.3' in html and 'seven SuperGLUE tasks' in html


def test_few_seeds_are_told_where_they_are(tmp_path):
    """Of three planned seeds the baseline has two; one arm has all, one has one, one shares none with it."""
    right = {'pooled': 20, 'full': 21, 'lone': 40, 'apart': 40}
    cells = [('pooled', 1), ('pooled', 2), ('full', 1), ('full', 2), ('full', 3), ('lone', 1), ('apart', 3)]
    labels = [0, 1] * 20
    lines = [
        line('a', arm, seed, labels, labels[: right[arm]] + [1 - label for label in labels[right[arm] :]])
        for arm, seed in cells
    ]
    for text in reported(write(tmp_path, lines)):
        assert 'No seed in common with pooled, so not compared: a apart.' in text
        assert re.search(r'\[.*\] no difference shown\s\(2\sseeds\)', text)
        assert re.search(r'\[.*\] no verdict\s\(1\sseed\)', text)
        assert 'says nothing of what another seed would give; it is no verdict.' in text
    found = answer(tmp_path)
    assert re.search(
        r'; no verdict yet for lone \(.* points, 1\sseed\); 1 to 2 seeds, 95 % intervals, of one seed', found
    )
    assert 'gain' not in found and 'apart' not in found


def test_three_planned_seeds_and_one_that_is_there(tmp_path):
    plan = {'baseline': 'pooled', 'tasks': {'a': {}}, 'arms': {'pooled': {}, 'arm': {}}, 'seeds': [1, 2, 3]}
    lines = [line('a', arm, 1, [0, 1] * 40, [0, i] * 40) for i, arm in enumerate(('pooled', 'arm'))]
    html, _ = reported(write(tmp_path, lines, plan))
    assert re.search(
        r': no verdict yet for arm \(.*; one seed, so the 95 % intervals are over rows alone\.$', answer(tmp_path)
    )
    assert 'Student' not in html
