"""On paper: what a rank of a cluster holds, what moves over its network, and what a set of a billion rows asks for.

Nothing here is measured. Activations, and what a framework keeps besides, are left out. The formulas stand in the
docstrings, each with its source; fp32 weights, gradients and Adam states with bf16 for the arithmetic are Composer's
``amp_bf16``.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from dhrd_plugin.benchmarks.table import make_row
from dhrd_plugin.models.build import add_lora
from dhrd_plugin.models.network import DualHeadNetwork

FP32, BF16, INT64 = 4, 2, 8  # bytes
GIB = 2**30
CHUNK = 256  # DualHeadNetwork's chunk_size


@dataclass(frozen=True)
class Model:
    """Numbers of parameters.

    Attributes:
        name: for the table.
        parameters: all of the network, both heads.
        block: of the largest decoder block.
        root: of what stands outside the decoder blocks.
        adapters: that LoRA trains, as the paper has it (E.4), the classification head included.
        frozen: that it does not.
        vocabulary: words.
    """

    name: str
    parameters: int
    block: int
    root: int
    adapters: int
    frozen: int
    vocabulary: int


@dataclass(frozen=True)
class Cluster:
    """Machines.

    Attributes:
        nodes: of them.
        ranks_per_node: GPUs of each.
        batch: rows of a rank in a step.
    """

    nodes: int = 8
    ranks_per_node: int = 8
    batch: int = 8

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Rows:
    """A set of rows.

    Attributes:
        count: of them.
        tokens: of a row, input and reasoning.
        supervised: of these, on which the reasoning loss is.
        size: bytes of a row in a shard.
        per_shard: rows.
        entry: bytes of a shard's entry in the index.
    """

    count: int
    tokens: float
    supervised: float
    size: float
    per_shard: float
    entry: float


def qwen3_8b() -> PretrainedConfig:
    """The shapes of Qwen/Qwen3-8B, as its ``config.json`` has them."""
    return Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip


def count_parameters(name: str, config: PretrainedConfig, num_labels: int = 2) -> Model:
    """The numbers of a dual-head network of this config, built without weights; LoRA by peft itself."""
    with torch.device('meta'):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        network = DualHeadNetwork(lm, num_labels)
        blocks = [_count(module) for module in network.modules() if network.fsdp_wrap_fn(module)]
        parameters = _count(network)
        add_lora(network, {})
    adapters = _count(network, trained=True)
    return Model(
        name=name, parameters=parameters, block=max(blocks), root=parameters - sum(blocks), adapters=adapters,
        frozen=_count(network) - adapters, vocabulary=config.vocab_size,
    )  # fmt: skip


def _count(module: torch.nn.Module, trained: bool = False) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad or not trained)


# ------------------------------------------------------------------------------------------- model


def held(model: Model, ranks: int) -> dict[str, float]:
    """Bytes of weights, gradients and Adam's two moments on each rank.

    * DDP: ``(4 + 4 + 8) P``, and ``4 P`` of the buckets that gradients are copied to (torch's
      ``DistributedDataParallel`` without ``gradient_as_bucket_view``, as Composer's ``prepare_ddp_module`` builds it).
    * FSDP, full shard: ``16 P / N`` (ZeRO stage 3, arXiv:1910.02054, section 5), and in bf16 what is gathered at a
      time: the root unit, the block at work and the one fetched ahead of it.
    * LoRA under DDP: ``4`` bytes of what is frozen, ``20`` of what is trained.
    """
    whole, buckets = (1 + 1 + 2) * FP32, FP32
    return {
        'DDP': (whole + buckets) * model.parameters,
        'FSDP': whole * model.parameters / ranks + BF16 * (model.root + 2 * model.block),
        'LoRA, DDP': FP32 * model.frozen + (whole + buckets) * model.adapters,
    }


def moved(model: Model, ranks: int) -> dict[str, float]:
    """Bytes that each rank sends, and receives, in a step of one microbatch.

    * DDP: a ring all-reduce of fp32 gradients, ``2 (N - 1) / N`` times their bytes (Patarasuk and Yuan, Bandwidth
      optimal all-reduce algorithms, 2009; NCCL's ``busbw``).
    * FSDP: two all-gathers in bf16, forward and backward, and a reduce-scatter in fp32, each ``(N - 1) / N`` of the
      bytes (Composer's ``get_mixed_precision``, ``DEFAULT``). More microbatches move that much each.
    * LoRA under DDP: as DDP, of what is trained.
    """
    share = (ranks - 1) / ranks
    return {
        'DDP': 2 * share * FP32 * model.parameters,
        'FSDP': share * (2 * BF16 + FP32) * model.parameters,
        'LoRA, DDP': 2 * share * FP32 * model.adapters,
    }


def logits(model: Model, tokens: float) -> dict[str, float]:
    """Bytes of the logits of so many supervised tokens.

    Full: fp32 alone, without the softmax and the gradient that stand beside them. Chunked: a bf16 buffer and its fp32
    copy, over which the gradient is written (``losses._chunks``).
    """
    return {
        'full': FP32 * tokens * model.vocabulary,
        'chunked': (BF16 + FP32) * min(tokens, CHUNK) * model.vocabulary,
    }


# -------------------------------------------------------------------------------------------- rows


def order_bytes(rows: int, cluster: Cluster, workers: int = 1) -> int:
    """Bytes of an epoch's order, which every node holds in shared memory for all ranks, until each has its part.

    The local leader makes it (``StreamingDataset._get_work``, ``batching.generate_work``) and shares it
    (``_share_work``): int64 sample ids of all nodes, each node's rows rounded up to its ranks, each rank's to batches
    of all its workers (``partition.orig.get_partitions_orig``). Then a rank keeps its own part.
    """
    by_rank = math.ceil(math.ceil(rows / cluster.nodes) / cluster.ranks_per_node)
    step = workers * cluster.batch
    return INT64 * cluster.ranks * math.ceil(by_rank / step) * step


def stream(rows: Rows, cluster: Cluster) -> dict[str, float]:
    """What the set asks of the network and of each node, in bytes, and how many shards it has.

    A node reads the shards of its canonical node (one a node by default; ``shuffle.py1e`` keeps them the same in each
    epoch), and those cut at its two ends besides, which is left out. It downloads them in every epoch where its disk
    (``cache_limit``) does not hold them, else in the first one.
    """
    shards = math.ceil(rows.count / rows.per_shard)
    return {
        'shards': shards,
        'set': rows.count * rows.size,
        'node': rows.count * rows.size / cluster.nodes,
        'index': shards * rows.entry,
        'order': order_bytes(rows.count, cluster),
        'rank': order_bytes(rows.count, cluster) / cluster.ranks,
    }


def epoch_hours(rows: Rows, cluster: Cluster, rate: float) -> float:
    """Hours of an epoch at so many tokens a second and GPU."""
    return rows.count * rows.tokens / (rate * cluster.ranks) / 3600


# ------------------------------------------------------------------------------------------- table


def model_rows(model: Model, rows: Rows, cluster: Cluster) -> list[dict[str, Any]]:
    """The table of a model: what a rank holds and moves in a step, against DDP; logits against the full ones."""
    tokens = cluster.batch * rows.supervised
    tables = {
        'a rank holds': (held(model, cluster.ranks), 'DDP'),
        'a rank sends in a step': (moved(model, cluster.ranks), 'DDP'),
        f'logits of {tokens:,.0f} supervised tokens': (logits(model, tokens), 'full'),
    }
    return [
        make_row(f'on paper, {model.name}, {what}, {way}', [size / GIB], 'GiB', [size / sizes[base]], base)
        for what, (sizes, base) in tables.items()
        for way, size in sizes.items()
    ]


def stream_rows(rows: Rows, cluster: Cluster, order: tuple[float, float]) -> list[dict[str, Any]]:
    """The table of a set.

    Args:
        rows: the set.
        cluster: that trains on it.
        order: seconds and peak bytes a row of the ordering, as they were measured.
    """
    found = stream(rows, cluster)
    seconds, peak = order
    return [
        make_row('on paper, set', [found['set'] / GIB], 'GiB'),
        make_row('on paper, shards', [found['shards']]),
        make_row('on paper, index.json', [found['index'] / GIB], 'GiB'),
        make_row('on paper, download of a node in an epoch', [found['node'] / GIB], 'GiB'),
        make_row('on paper, order of an epoch, shared memory of a node', [found['order'] / GIB], 'GiB'),
        make_row('on paper, order of an epoch, kept by a rank', [found['rank'] / GIB], 'GiB'),
        make_row('on paper, order of an epoch, peak of a node', [rows.count * peak / GIB], 'GiB'),
        make_row('on paper, order of an epoch, time at least', [rows.count * seconds / 60], 'min'),
        make_row('on paper, epoch, at 1,000 tokens/s/GPU', [epoch_hours(rows, cluster, 1000)], 'h'),
    ]
