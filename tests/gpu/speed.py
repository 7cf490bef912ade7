"""How fast a bare training step is, of real tokens only, and what it holds."""

import itertools
import statistics
import time

import torch
from gpu.common import (
    PEAK,
    TINY,
    WAYS,
    autocast,
    classifier,
    collated,
    device,
    emit,
    losses,
    median_ms,
    on_gpu,
    operations,
    peak_mib,
    rows,
    section,
    sync,
    tf32,
    to_device,
    tokenizer,
    told,
    way_of,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from dhrd_plugin.models import padding_free as unpadded

LLAMA3 = {'vocab_size': 128_256, 'rope_theta': 500_000.0, 'max_position_embeddings': 131_072, 'rms_norm_eps': 1e-5}
SHAPES = {  # those of Llama 3.2 and 3.1
    '1B': {'hidden_size': 2048, 'num_hidden_layers': 16, 'num_attention_heads': 32, 'num_key_value_heads': 8}
    | {'intermediate_size': 8192, 'head_dim': 64, 'tie_word_embeddings': True},
    '8B': {'hidden_size': 4096, 'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': 8}
    | {'intermediate_size': 14_336, 'tie_word_embeddings': False},
}


def stepper(model, optimizer, half, reasoning=True):
    """A function that makes a whole step on a batch of the CPU."""

    def step(batch):
        with autocast(half):
            total, *_ = losses(model, to_device(batch), reasoning)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def figures(model, batches, ms, lora=False):
    """Rows and real tokens a second, and the MFU, of the median step over such batches."""
    counted = [operations(model.network, batch, lora) for batch in batches]
    flops, tokens = (statistics.mean(values) for values in zip(*counted))
    size, seconds = len(batches[0]['labels']), ms / 1000
    return {'rows_s': size / seconds, 'tokens_s': tokens / seconds, 'mfu': flops / seconds / PEAK, 'tokens': tokens}


@section(110)
def speed():
    """SmolLM2-135M on real rows, whole and with LoRA."""
    task, found = rows(16 if TINY else 1024)
    tok = tokenizer()
    for lora, way, size, reasoning in [
        *((False, way, 64, True) for way in WAYS),
        (False, 'one kernel', 256, True),
        (False, 'padded', 256, True),
        (False, 'padded', 64, False),
        (False, 'one kernel', 64, False),
        (False, 'compiled', 64, True),
        (False, 'compiled', 256, True),
        (False, 'compiled', 512, True),
        *((True, way, 64, True) for way in WAYS),
        (False, 'one kernel', 8, True),
        (False, 'padded', 8, True),
    ]:
        size = min(size, 4) if TINY else size
        what = {'model': '135M', 'precision': 'bf16' if on_gpu() else 'fp32', 'trained': 'LoRA' if lora else 'whole'}
        what |= {'way': way, 'rows': size, 'reasoning': reasoning}
        if way == 'one kernel' and not on_gpu():
            continue
        model = step = weights = batches = None  # the next one needs the memory
        with told('speed', **what), tf32(True), way_of(way) as free:  # as Composer's Trainer allows it
            model = classifier(task, tok, padding_free=free, lora=lora)
            if way == 'compiled':
                model.network.compile_blocks()
            weights = [p for p in model.parameters() if p.requires_grad]
            step = stepper(model, torch.optim.AdamW(weights, lr=1e-5, fused=on_gpu()), on_gpu(), reasoning)
            batches = list(itertools.islice(collated(task, tok, found, size).dataloader, 4))
            start = time.perf_counter()
            step(batches[0])
            sync()
            first = time.perf_counter() - start  # compiled, most of it the compiler's
            held = peak_mib(lambda: step(batches[0]))
            turn = itertools.cycle(batches)
            ms = median_ms(lambda: step(next(turn)), 1.0, 4, 60)
            start = time.perf_counter()
            step(batches[0])
            host = 1000 * (time.perf_counter() - start)
            sync()
            counted = batches if reasoning else [_inputs(batch) for batch in batches]
            emit(
                'speed', **what, ms=ms, host_ms=host, first_s=first, peak_mib=held, **figures(model, counted, ms, lora)
            )


def _inputs(batch):
    """What is run of a batch without the reasoning loss: the tokens up to the pooled one, and no target."""
    real = torch.arange(batch['input_ids'].shape[1]) <= batch['pool_index'][:, None]
    return {'labels': batch['labels'], 'attention_mask': batch['attention_mask'] * real}


@section(100)
def shapes():
    """Random weights in the shapes of Llama 3.2 1B (AdamW) and Llama 3.1 8B (bf16 weights, plain SGD): three steps."""
    task, found = rows(8 if TINY else 512)
    tok = tokenizer()
    small = {'hidden_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 1}
    for name, half, count, way in [
        ('1B', False, 128, 'one kernel'),
        ('8B', True, 32, 'one kernel'),
        ('1B', True, 128, 'one kernel'),
        ('8B', True, 64, 'one kernel'),
        ('1B', False, 128, 'padded'),
        ('8B', True, 32, 'padded'),
    ]:
        shape = {**LLAMA3, **SHAPES[name], **(small | {'head_dim': 32, 'intermediate_size': 96} if TINY else {})}
        size = 4 if TINY else count
        way = way if on_gpu() or way == 'padded' else 'row by row'
        adam = name == '1B'
        what = {'model': name, 'precision': 'bf16 weights' if half else 'bf16', 'trained': 'whole', 'way': way}
        what |= {'rows': size, 'reasoning': True, 'optimizer': 'AdamW' if adam else 'SGD'}
        with told('shapes', **what), tf32(True), way_of(way) as free:
            dtype = torch.bfloat16 if half and on_gpu() else torch.float32
            with torch.device(device()):
                lm = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
            model = _built(task, tok, free, lm, what)
            # In place, and each weight by itself: a list of all of them at once would hold another copy.
            options = {'fused': True} if on_gpu() else {}
            kind = torch.optim.AdamW if adam else torch.optim.SGD
            step = stepper(model, kind(model.parameters(), lr=1e-5, **options), on_gpu())
            batches = list(itertools.islice(collated(task, tok, found, size).dataloader, 2))
            step(batches[0])
            held = peak_mib(lambda: step(batches[0]))
            weights = round(torch.cuda.memory_allocated() / 2**20) if on_gpu() else None
            turn = itertools.cycle(batches)
            ms = median_ms(lambda: step(next(turn)), 0.1, 1, 3)
            emit('shapes', **what, ms=ms, peak_mib=held, held_mib=weights, **figures(model, batches, ms))
        model = step = lm = None  # the next one needs the memory


def _built(task, tok, free, lm, what):
    """The classifier; where a probe refuses the random weights, that is said, and it goes on."""
    try:
        return classifier(task, tok, padding_free=free, lm=lm)
    except Exception as error:
        emit('shapes', **what, refused=f'{type(error).__name__}: {error}'[:300])
    unpadded._error = lambda *_: None
    return classifier(task, tok, padding_free=free, lm=lm, probe=False)
