"""What is here, and whether it computes the same: on the GPU as on the CPU, in bf16 as nearly as bf16 can."""

import gc
import importlib.metadata
import os
import sys
from contextlib import suppress

import tiny
import torch
import torch.nn.functional as F
from gpu.common import (
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
    peak_mib,
    rows,
    section,
    tf32,
    to_device,
    tokenizer,
    told,
    way_of,
)

from dhrd_plugin import TripletCollator
from dhrd_plugin.losses import linear_cross_entropy, weighted_mean
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork

PACKAGES = ('torch', 'transformers', 'accelerate', 'tokenizers', 'numpy', 'torchmetrics', 'peft', 'triton', 'mosaicml')
CPU = torch.device('cpu')


@section(40)
def env():
    """Versions, the GPU, and the two ceilings: a bf16 product and a copy."""
    found = {}
    for name in (*PACKAGES, 'mosaicml-streaming', 'dhrd-plugin', 'flash-attn'):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    gpu = {}
    if on_gpu():
        p = torch.cuda.get_device_properties(0)
        gpu = {'name': p.name, 'sms': p.multi_processor_count, 'gib': round(p.total_memory / 2**30, 1)}
        gpu |= {'cuda': torch.version.cuda, 'nccl': str(torch.cuda.nccl.version())}
    cores = len(os.sched_getaffinity(0))
    emit('env', python=sys.version.split()[0], cores=cores, versions=found, gpu=gpu, one_kernel=on_gpu())
    size = 256 if TINY else 8192
    a = torch.randn(size, size, device=device(), dtype=torch.bfloat16)
    b = torch.empty(2 ** (20 if TINY else 30), device=device(), dtype=torch.uint8)
    product, copy = median_ms(lambda: a @ a), median_ms(b.clone)
    emit('env', bf16_tflops=2 * size**3 / product / 1e9, copy_tb_s=2 * b.numel() / copy / 1e9)


def gradients(model, batch, where, half):
    """The loss, and each weight's gradient in fp64 on the CPU."""
    with autocast(half, where.type):
        total, *_ = losses(model, to_device(batch, where))
    model.zero_grad()
    total.backward()
    return float(total), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


@section(90, alone=False)
def parity_tiny():
    """Two layers of every kind, by each way, against fp64 on the CPU."""
    batch = TripletCollator(tiny.tiny_tokenizer(), tiny.LABELS)(tiny.triplets(8))

    def make(kind, free):
        torch.manual_seed(1)
        network = DualHeadNetwork(tiny.tiny_lm(kind), len(tiny.LABELS), chunk_size=5, padding_free=free)
        return ComposerDualHeadClassifier(network, tiny.tiny_tokenizer(), tiny.LABELS).train()

    for kind in tiny.KINDS:
        want, wanted = gradients(tiny.exact(make(kind, False)), batch, CPU, False)
        for way in WAYS:
            for half in (False, True):
                if way == 'one kernel' and not (on_gpu() and half):
                    continue
                what = {'kind': kind, 'way': way, 'precision': 'bf16' if half else 'fp32'}
                with told('parity_tiny', **what), tf32(False), way_of(way) as free:
                    loss, found = gradients(make(kind, free).to(device()), batch, device(), half)
                    far = {'loss_error': abs(loss - want) / want, 'gradient_error': tiny.relative_error(found, wanted)}
                    emit('parity_tiny', **what, **far)


@section(120, alone=False)
def parity_real():
    """SmolLM2-135M on real rows, by each way, against fp64 on the CPU."""
    task, found = rows(4 if TINY else 16)
    tok = tokenizer()
    batch = next(iter(collated(task, tok, found, len(found)).dataloader))
    want, wanted = gradients(classifier(task, tok, where=CPU).double(), batch, CPU, False)
    flat = torch.cat([wanted[name].flatten() for name in wanted])
    ways = [(way, half, False) for half in (False, True) for way in WAYS] + [('padded', False, True)]
    for way, half, coarse in ways:
        if way == 'one kernel' and not (on_gpu() and half):
            continue
        what = {'way': way, 'precision': 'bf16' if half else 'TF32' if coarse else 'fp32'}
        with told('parity_real', **what), tf32(coarse), way_of(way) as free:
            loss, mine = gradients(classifier(task, tok, padding_free=free), batch, device(), half)
            other = torch.cat([mine[name].flatten() for name in wanted])
            far = float((other - flat).norm() / flat.norm())
            worst = max(
                wanted, key=lambda name: float((mine[name] - wanted[name]).norm() / (wanted[name].norm() + 1e-12))
            )
            emit('parity_real', **what, loss=loss, loss_error=abs(loss - want) / want, gradient_error=far, worst=worst)


@section(60)
def loss_memory():
    """The chunked reasoning loss beside full logits, forward and backward: milliseconds and memory."""
    for trained in (True, False):  # whole, or LoRA: the LM head's weight has no gradient
        _loss_memory(trained, *((64, 512, 32) if TINY else (16_384, 128_000, 4096)))
        gc.collect()


def _loss_memory(trained, tokens, words, hidden):
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    states = torch.randn(tokens, hidden, device=device(), dtype=dtype, requires_grad=True)
    weight = (torch.randn(words, hidden, device=device(), dtype=dtype) / hidden**0.5).requires_grad_(trained)
    targets = torch.randint(words, (tokens,), device=device())
    full = None
    for size in (None, 256, 512, 1024, 2048, 4096):

        def work():
            if size is None:
                loss = F.cross_entropy(F.linear(states, weight).float(), targets)
            else:
                loss = weighted_mean(linear_cross_entropy(states, weight, None, targets, size))
            loss.backward()
            states.grad = weight.grad = None
            return loss.detach()

        what = {'way': f'chunks of {size}' if size else 'full logits', 'head_trained': trained}
        with told('loss_memory', **what), tf32(True):  # as Composer's Trainer allows it
            loss, held = float(work()), peak_mib(work)
            full = full or held
            ms = median_ms(work, 0.3, 1)
            rate = 2 * tokens * words * hidden * (3 if trained else 2) / (ms / 1000) / 1e12
            emit('loss_memory', **what, ms=ms, peak_mib=held, of_full=held and held / full, tflops=rate, loss=loss)
