"""The product as its users run it: the command, the export, a kill; Composer's loop, its waits, compile_config."""

import collections
import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from benchmarks import steps
from benchmarks.measure import interleave, ratios
from composer.core import Callback
from gpu.common import (
    LAYERS,
    MODEL,
    ROOT,
    TINY,
    Clock,
    autocast,
    device,
    emit,
    on_gpu,
    overrides,
    rows,
    section,
    tf32,
    tokenizer,
    told,
    trained,
)
from safetensors.torch import load_file
from torch import _dynamo as dynamo

from dhrd_plugin.export.load import load_classifier
from dhrd_plugin.models.build import build_causal_lm

STEPS = 8 if TINY else 40
WHOLE = ('model.lora=null', 'optimizer.lr=5e-5')
BIG = () if TINY else ('global_train_batch_size=64', 'device_train_microbatch_size=64')


def environment():
    """For a command: the checkout first, and few threads, since several run at once."""
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    return {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1' if TINY else '4'}


def composer(folder, *more):
    """``composer scripts/train.py yamls/rte.yaml ...``, begun; its output goes into a file beside the folder."""
    found = shutil.which('composer', path=f'{Path(sys.executable).parent}:{os.environ.get("PATH", "")}')
    # By this Python: an installed command may name another.
    command = [sys.executable, found] if found else [sys.executable, '-m', 'composer.cli.launcher']
    words = [*command, 'scripts/train.py', 'yamls/rte.yaml', *overrides(folder, *more)]
    with open(f'{folder}.txt', 'w') as file:
        return subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=file)


def kill(process):
    """End a command and its ranks at once, as the system does where memory runs out."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.wait()


def run(folder, *more):
    """A whole run by the command; seconds. What it said stands in the error where it failed."""
    start = time.time()
    code = composer(folder, *more).wait()
    if code:
        raise RuntimeError(f'exit status {code}: {Path(f"{folder}.txt").read_text()[-400:]}')
    return time.time() - start


def broken_run(folder, *more):
    """A run that is killed when it has a checkpoint, and goes on; the steps of that checkpoint."""
    process, saved = composer(folder, *more), folder / 'checkpoints'
    while process.poll() is None and not list(saved.glob('ep*ba*')):
        time.sleep(0.05)
    if process.poll() is not None:
        raise RuntimeError(f'ended before it was killed: {Path(f"{folder}.txt").read_text()[-400:]}')
    kill(process)
    found = sorted(path.name for path in saved.glob('ep*ba*'))
    run(folder, *more, 'autoresume=true')
    return found


def weights(folder):
    (file,) = (folder / 'slim').glob('*.safetensors')
    return load_file(file)


def furthest(one, other):
    """The largest difference of two exports' weights; None where their names differ."""
    if one.keys() != other.keys():
        return None
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@section(150, alone=False)
def product():
    """The command by its defaults, LoRA and whole; evaluate and predict on the export; a run that is killed."""
    root = Path(tempfile.mkdtemp(prefix='dhrd_gpu_'))
    save = (
        'save_folder=${output_dir}/checkpoints',
        f'save_interval={STEPS // 4}ba',
        'save_num_checkpoints_to_keep=1',
        f'max_duration={STEPS}ba',
    )
    whole = (*WHOLE, 'eval_interval=0', *save)
    runs = {  # at once: nothing here is timed
        'lora': (run, f'max_duration={STEPS}ba'),
        'whole': (run, *whole),
        'whole_again': (run, *whole),
        'killed': (broken_run, *whole),
    }
    with ThreadPoolExecutor(8) as pool:
        futures = {name: pool.submit(work, root / name, *more) for name, (work, *more) in runs.items()}
        for name, future in futures.items():
            with told('product', way=name):
                done = future.result()
                summary = json.loads((root / name / 'summary.json').read_text())
                kept = {key: summary.get(key) for key in ('steps', 'rows', 'seconds_per_step', 'metrics', 'seconds')}
                emit('product', way=name, command_seconds_or_saved=done, **kept)
            if name == 'lora':
                asked = [pool.submit(verb_on, root / 'lora' / 'slim', verb) for verb in ('evaluate', 'predict')]
        for future in asked:
            with told('product', way='the export'):
                emit('product', **future.result())
    with told('product', way='resume after a kill'):
        broken, one, other = (weights(root / name) for name in ('killed', 'whole', 'whole_again'))
        far, noise = furthest(broken, one), furthest(one, other)
        emit('product', way='resume after a kill', from_unbroken=far, between_two_unbroken=noise)
    shutil.rmtree(root, ignore_errors=True)


def verb_on(place, verb):
    """``dhrd evaluate`` or ``dhrd predict`` on the validation rows."""
    data = Path(os.environ.get('DHRD_SHARED', os.devnull)) / 'data' / 'superglue' / 'RTE' / 'val.jsonl'
    data = data if data.is_file() else ROOT / 'dhrd_plugin' / 'data' / 'sample' / 'validation.jsonl'
    words, start = [str(data)] if verb == 'evaluate' else ['--input', str(data)], time.time()
    command = [sys.executable, '-m', 'dhrd_plugin', verb, str(place), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    found = {
        'way': verb,
        'status': done.returncode,
        'seconds': time.time() - start,
        'lines': len(said),
        'said': said[-4:],
    }
    return found if not done.returncode else {**found, 'error': done.stderr[-400:]}


@section(60, alone=False)
def export():
    """The exported classifier against the live model, after a run in bf16: probabilities and labels."""
    for lora in (True, False):
        with told('export', lora=lora):
            trainer, series, _, folder = trained(f'max_duration={STEPS}ba', *(() if lora else WHOLE))
            _, found = rows(16 if TINY else 0, 'validation')
            texts = [row['input_text'] for row in found]
            network = trainer.state.model.network.eval()
            slim = load_classifier(folder / 'slim')
            batch = slim.tokenizer(texts, return_tensors='pt', padding=True)
            inputs = {name: batch[name].to(device()) for name in ('input_ids', 'attention_mask')}
            with torch.inference_mode(), tf32(False):
                live = network(**inputs).logits.float().cpu()
                with autocast(on_gpu()):
                    half = network(**inputs).logits.float().cpu()
                slim.model.to(device())
                ours = slim.predict_proba(found)
                slim.model.to(torch.bfloat16)
                rounded = slim.predict_proba(found)
            emit(
                'export',
                lora=lora,
                precision=str(trainer.state.precision),
                rows=len(texts),
                losses=series['loss/train/total'][:: STEPS - 1],
                probabilities_export_live=float((ours - live.softmax(-1)).abs().max()),
                labels_export_live=int((ours.argmax(-1) != live.argmax(-1)).sum()),
                labels_export_live_bf16=int((ours.argmax(-1) != half.argmax(-1)).sum()),
                labels_bf16_export_live_bf16=int((rounded.argmax(-1) != half.argmax(-1)).sum()),
                probabilities_bf16_fp32=float((half.softmax(-1) - live.softmax(-1)).abs().max()),
            )
            trainer.close()


@section(60)
def composer_loop():
    """Composer's loop beside a bare loop over the same microbatches; the ratio of rounds."""
    size, count = (4, 12) if TINY else (64, 512)
    steps.BATCH = size
    task, found = rows(count)

    for free in (True, False):
        with told('composer_loop', padding_free=free):
            bench = steps.make_bench(build_causal_lm(MODEL, config_overrides=LAYERS), tokenizer(), task)
            through = steps.ThroughComposer(bench, found, size, free)
            bare = steps.bare_loop(bench, found, size, free)
            spent = interleave({'composer': through, 'bare': bare}, 2 if TINY else 4)
            # What begins and ends a fit and an epoch is not of the loop.
            mine = through.seconds[-len(spent['bare']) :]
            many = count // size
            halves = {'composer': mine, 'bare': spent['bare']}
            ms = {name: round(1000 * statistics.median(values) / many, 2) for name, values in halves.items()}
            ratio = sorted(ratios(mine, spent['bare']))
            emit('composer_loop', padding_free=free, rows=size, ms=ms, ratio=statistics.median(ratio), ratios=ratio)
            through.trainer.close()


class Waits(Callback):
    """torch warns where the host waits for the GPU, in two steps of the run."""

    def batch_start(self, state, logger):
        torch.cuda.set_sync_debug_mode('warn' if state.timestamp.batch in (4, 5) else 'default')

    def batch_end(self, state, logger):
        torch.cuda.set_sync_debug_mode('default')


@section(60)
def syncs():
    """Where the host waits for the GPU in a step of the real trainer, by file and line."""
    if not on_gpu():
        return
    for free in (True, False):
        with told('syncs', padding_free=free), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            trainer, *_ = trained('max_duration=8ba', *WHOLE, f'model.padding_free={str(free).lower()}', watch=Waits())
            trainer.close()
            places = [(w.filename, w.lineno) for w in caught if 'synchroniz' in str(w.message)]
            seen = collections.Counter(f'{"/".join(Path(file).parts[-3:])}:{line}' for file, line in places)
            ours = sum('/dhrd_plugin/' in file or '/transformers/' in file for file, _ in places)
            emit('syncs', padding_free=free, a_step=len(places) / 2, ours=ours / 2, where=dict(seen.most_common(25)))


class Places(logging.Handler):
    """Where torch.compile breaks its graph, by file and line."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def emit(self, record):
        found = re.search(r'Graph break.* at (\S+:\d+)', record.getMessage())
        if found:
            self.found['/'.join(Path(found[1]).parts[-3:])] += 1


@section(150)
def compiled():
    """``compile_config`` through the trainer: whether it runs, its graph breaks and where, and how quick it is."""
    torch._logging.set_logs(graph_breaks=True)
    log = logging.getLogger('torch._dynamo.symbolic_convert.__graph_breaks')
    for free in (False, True):
        for way, more in {'eager': (), 'compiled': ('compile_config={}',)}.items():
            what = {'model': '135M', 'way': f'{way}, {"padding_free" if free else "padded"}', 'trained': 'whole'}
            with told('compiled', **what):
                dynamo.reset()
                dynamo.utils.counters.clear()
                places = Places()
                log.handlers = [places]
                clock, start = Clock(), time.time()
                fixed = f'model.padding_free={str(free).lower()}', 'callbacks.drop_reasoning_head=null'
                trainer, series, summary, _ = trained(
                    f'max_duration={STEPS}ba', *WHOLE, *BIG, *fixed, *more, watch=clock
                )
                counters = dynamo.utils.counters
                emit(
                    'compiled',
                    **what,
                    precision='bf16' if on_gpu() else 'fp32',
                    rows=trainer.state.train_dataloader.batch_size,
                    ms=clock.ms,
                    tokens_s=summary['tokens'] / summary['steps'] / clock.ms * 1000,
                    seconds=time.time() - start,
                    losses=series['loss/train/total'][:: STEPS - 1],
                    graphs=counters['stats'].get('unique_graphs', 0),
                    graph_breaks=sum(counters['graph_break'].values()),
                    breaks={reason[:100]: count for reason, count in counters['graph_break'].most_common(8)},
                    places=dict(places.found.most_common(12)),
                )
                trainer.close()
