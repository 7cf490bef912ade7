"""How fast an export answers: ``predict`` by batch size, one query by its kernels, pipeline, chain of thought."""

import tempfile
import time
from pathlib import Path

import torch
from benchmarks.infer import ask_pipeline, prompt
from benchmarks.material import build_classifier
from gpu.common import LAYERS, MODEL, TINY, device, emit, median_ms, on_gpu, rows, section, sync, tokenizer, told

from dhrd_plugin.export.load import load_classifier
from dhrd_plugin.export.write import write_slim
from dhrd_plugin.models.build import build_causal_lm, load_slim

TOKENS = 230  # the paper's average input


def exported():
    """SmolLM2-135M with a random head as an export, opened; and its folder."""
    task, _ = rows(1)
    model = build_classifier(build_causal_lm(MODEL, config_overrides=LAYERS), tokenizer(), task)
    folder = write_slim(model.get_metadata(), model.network.state_dict(), Path(tempfile.mkdtemp()) / 'slim')
    return load_classifier(folder), folder


def texts(tok, count):
    """So many texts of 230 tokens, out of real ones."""
    _, found = rows(0, 'validation')
    ids = [i for row in found for i in tok(row['input_text'])['input_ids']]
    ids = ids * (1 + count * TOKENS // len(ids))
    return [tok.decode(ids[start * TOKENS : (start + 1) * TOKENS]) for start in range(count)]


@section(80)
def predict():
    """Rows a second by batch size and precision; one query beside the sum of its kernels; transformers' pipeline."""
    slim, folder = exported()
    tok, many = slim.tokenizer, texts(slim.tokenizer, 8 if TINY else 2048)
    slim.model.to(device())
    spent = median_ms(lambda: tok(many, verbose=False), 0.3, 1, 5)
    emit('predict', model='135M', way='tokenizer alone', rows_s=1000 * len(many) / spent)
    for dtype in (torch.bfloat16, torch.float32):
        slim.model.to(dtype)
        name = str(dtype).removeprefix('torch.')
        for size in (4,) if TINY else (32, 64, 128, 256, 512) if dtype == torch.bfloat16 else (32, 256):
            with told('predict', precision=name, rows=size):
                ms = median_ms(lambda: slim.predict_proba(many, size), 0.5, 1, 4)
                batch = tok(many[:size], return_tensors='pt', padding=True).to(device())
                inputs = {key: batch[key] for key in ('input_ids', 'attention_mask')}
                with torch.inference_mode():
                    bare = median_ms(lambda: slim.model(**inputs), 0.3)
                what = {'model': '135M', 'precision': name, 'way': 'dhrd predict', 'rows': size}
                emit('predict', **what, rows_s=1000 * len(many) / ms, forward_rows_s=1000 * size / bare)
        with told('predict', precision=name, rows=1):
            one_query(slim, tok, many[0], name)
    with told('predict', way='pipeline'):
        model = load_slim(folder).to(device())
        pipe, some = ask_pipeline(model, slim.tokenizer), many[:512]
        ms = median_ms(lambda: pipe(some), 0.5, 1, 3)
        emit('predict', model='135M', way='pipeline', precision='float32', rows=32, rows_s=1000 * len(some) / ms)


def one_query(slim, tok, text, name):
    """The median of one query, that of its forward pass, and how long its kernels take."""
    ms = median_ms(lambda: slim.predict_proba([text]), 0.6, 5)
    batch = tok([text], return_tensors='pt').to(device())
    inputs = {key: batch[key] for key in ('input_ids', 'attention_mask')}
    kernels = launches = None
    with torch.inference_mode():
        bare = median_ms(lambda: slim.model(**inputs), 0.5, 5)
        if on_gpu():
            kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=kinds) as profile:
                slim.model(**inputs)
                sync()
            events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            kernels, launches = sum(event.time_range.elapsed_us() for event in events) / 1000, len(events)
    what = {'model': '135M', 'precision': name, 'way': 'dhrd predict', 'rows': 1, 'ms': ms}
    emit('predict', **what, forward_ms=bare, kernels_ms=kernels, kernels=launches)


@section(60)
def chain_of_thought():
    """Queries a second of writing 500 tokens in batches of 32, and of ``predict`` on the same texts."""
    task, found = rows(4 if TINY else 32, 'validation')
    asked, tok, new = [row['input_text'] for row in found], tokenizer(), 8 if TINY else 500
    lm = build_causal_lm(MODEL, config_overrides=LAYERS).to(device(), torch.bfloat16 if on_gpu() else None).eval()
    slim, _ = exported()
    slim.model.to(device(), lm.dtype)
    many = asked * (1 if TINY else 32)
    ms = median_ms(lambda: slim.predict_proba(many, 32), 1.0, 1, 5)
    best = median_ms(lambda: slim.predict_proba(many, 512), 1.0, 1, 5)
    tok.padding_side = 'left'
    batch = tok([prompt(tok, text, task) for text in asked], return_tensors='pt', padding=True).to(device())
    inputs = {key: batch[key] for key in ('input_ids', 'attention_mask')}
    options = {'do_sample': True, 'temperature': 0.1, 'top_p': 0.7, 'pad_token_id': tok.pad_token_id}
    lm.generate(**inputs, max_new_tokens=4, **options)
    sync()
    start = time.perf_counter()
    lm.generate(**inputs, min_new_tokens=new, max_new_tokens=new, **options)
    sync()
    seconds = time.perf_counter() - start
    fast = 1000 * len(many) / ms
    emit(
        'chain_of_thought',
        model='135M',
        rows=len(asked),
        new_tokens=new,
        seconds=seconds,
        rows_s=len(asked) / seconds,
        predict_rows_s=fast,
        predict_rows_s_512=1000 * len(many) / best,
        ratio=fast * seconds / len(asked),
    )
