"""Kill a run at random moments, start it again by the same command, and compare what it ends with, bit for bit.

    python tests/kills.py --kills 20 --seed 1

Each line of the table is a run of 60 batches with one SIGKILL to the launcher and its ranks. The moments
cover the start, training, checkpoints being written, evaluation and the export.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from runs import EPOCH, STEPS, finish, kill, launch, losses, outcome, wait_for, write_run

from dhrd_plugin.checkpoints.whole import find_flaw

STAGES = ('save', 'train', 'export', 'save', 'train', 'eval', 'save', 'train', 'export', 'start')
COMPARED = ('weights', 'summary', 'export', 'losses')
HEADER = ('kill', 'ranks', 'stage', 'at step', 'half files', 'resumed from', 'weights', 'metrics', 'export', 'losses')


def moment(stage: str, out: Path, draw: random.Random):
    """When to kill: a test to wait for, and a delay in seconds after it."""
    log = out / 'log-rank0.txt'
    if stage == 'start':
        return (lambda: True), draw.uniform(0, 8)
    if stage == 'save':
        step = draw.choice(range(7, STEPS + 1, 7))
        return (lambda: any((out / 'checkpoints').glob(f'ep*-ba{step}-rank0.pt'))), draw.uniform(0, 0.02)
    if stage == 'export':
        return (lambda: any(out.glob('.slim.*.tmp'))), draw.uniform(0, 0.1)
    step = draw.choice(range(EPOCH, STEPS + 1, EPOCH)) if stage == 'eval' else draw.randrange(1, STEPS)
    line = f'[batch={step - 1}]: loss/train/total'
    return (lambda: log.exists() and line in log.read_text()), draw.uniform(0, 0.1)


def trial(yaml: Path, folder: Path, stage: str, ranks: int, draw: random.Random) -> tuple[dict | None, list[str]]:
    """One run that is killed and started again; what it ends with, and what happened."""
    out = folder / 'out'
    reached, delay = moment(stage, out, draw)
    process = launch(yaml, folder, ranks=ranks, start=subprocess.Popen)
    came = wait_for(process, reached)
    with suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    running = process.poll() is None
    kill(process)
    step = max(losses(out), default=-1) + 1
    files = sorted((out / 'checkpoints').glob('ep*.pt'))
    halves = [path.name for path in files if find_flaw(str(path))]
    halves += [path.name for path in out.glob('.slim.*.tmp')]
    again = launch(yaml, folder, ranks=ranks, start=subprocess.Popen)
    output = finish(again)
    resumed = [line.rsplit('/', 1)[-1] for line in output.splitlines() if line.startswith('going on from')]
    happened = [
        stage if came and running else f'{stage} (too late: it had ended with status {process.returncode})',
        str(step),
        ' '.join(halves) or '-',
        ' '.join(resumed) or 'the start',
    ]
    if not (out / 'summary.json').exists():
        print(f'the second start ended with status {again.returncode}: {output}', file=sys.stderr)
        return None, happened
    return outcome(out), happened


def main() -> int:
    """Print the table; the exit status is the number of runs that ended differently."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--hidden', type=int, default=768, help='width of the model; 768 makes checkpoints of 25 MB')
    options = parser.parse_args()
    draw = random.Random(options.seed)
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        yaml = write_run(Path(scratch) / 'run', options.hidden)
        straight = {}
        for ranks in (1, 2):
            folder = Path(scratch) / f'straight{ranks}'
            output = finish(launch(yaml, folder, ranks=ranks, start=subprocess.Popen))
            assert (folder / 'out' / 'summary.json').exists(), output
            straight[ranks] = outcome(folder / 'out')
            assert len(straight[ranks]['losses']) == STEPS
        print('| ' + ' | '.join(HEADER) + ' |\n|' + '---|' * len(HEADER), flush=True)
        for number in range(options.kills):
            ranks = 2 if number % 3 == 0 else 1
            folder = Path(scratch) / f'kill{number}'
            end, happened = trial(yaml, folder, STAGES[number % len(STAGES)], ranks, draw)
            same = [end is not None and end[key] == straight[ranks][key] for key in COMPARED]
            different += not all(same)
            cells = [str(number + 1), str(ranks), *happened, *('same' if one else 'DIFFERENT' for one in same)]
            print('| ' + ' | '.join(cells) + ' |', flush=True)
            shutil.rmtree(folder)
    print(f'{options.kills - different} of {options.kills} runs ended bit for bit as the runs that were never killed')
    return different


if __name__ == '__main__':
    sys.exit(main())
