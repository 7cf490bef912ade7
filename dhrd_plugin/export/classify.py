"""Class probabilities of texts, from any classifier, on any number of ranks."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from dhrd_plugin import ranks
from dhrd_plugin.data.texts import Text
from dhrd_plugin.data.truncate import fit
from dhrd_plugin.errors import UserError, user_errors

# The fixed cost of a small LM's forward pass on a CPU, in tokens. A GPU waits for its launches instead.
CPU_PADDING = 64
PRECISIONS = ('fp32', 'amp_bf16')


@torch.inference_mode()
def logits_of_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    batch_size: int | None,
    limit: int | None,
    precision: str = 'fp32',
) -> Tensor:
    """Compute the logits of texts, in their order; batched by length, so that there is little padding.

    Args:
        model: of a :class:`~dhrd_plugin.export.load.Classifier`.
        tokenizer: likewise.
        texts: N input texts, which know where they stand.
        batch_size: rows to a forward pass, at most; fewer on a CPU where that saves padding. None: 32, on a GPU 256.
        limit: of a text with more tokens what may be cut is cut (:func:`~dhrd_plugin.data.truncate.fit`). None: never.
        precision: ``'fp32'``, that of the weights, or ``'amp_bf16'``, autocast as in training on a GPU. Default:
            ``'fp32'``.

    Returns:
        [N, K] logits, fp32.

    Raises:
        UserError: a text of no token, or of more than the model has positions for, before any is classified; a model
            that cannot be run on them, or whose logits are not finite.
    """
    cut = [fit(tokenizer, text.text, text.cuttable, limit) for text in texts]
    encoded = tokenizer(cut, verbose=False)['input_ids'] if cut else []
    _check_lengths(model, [len(ids) for ids in encoded], [text.where for text in texts])
    device = model.device.type
    size, padding = (32, CPU_PADDING) if device == 'cpu' else (256, math.inf)
    order, found = [], []
    for rows in _batches_by_length([len(ids) for ids in encoded], batch_size or size, padding):
        with user_errors('the model cannot be run on these texts', kind=True):
            batch = tokenizer.pad({'input_ids': [encoded[index] for index in rows]}, return_tensors='pt')
            # By name: GPT-2's second argument is another one.
            inputs = {name: batch[name].to(model.device) for name in ('input_ids', 'attention_mask')}
            with torch.autocast(device, torch.bfloat16, enabled=precision == 'amp_bf16'):
                logits = model(**inputs).logits
        order += rows
        found.append(logits.float())  # a GPU is waited for once, at the end
    logits = torch.zeros(len(texts), model.config.num_labels)
    if found:
        logits[order] = torch.cat(found).cpu()
    if not logits.isfinite().all():
        raise UserError('the model gives logits that are not finite; expected the weights of a training that converged')
    return logits


def logits_on_ranks(
    model: Any, tokenizer: Any, texts: Sequence[Text], batch_size: int | None, limit: int | None, precision: str
) -> Tensor:
    """:func:`logits_of_texts` of the same N texts on every rank, which all have to call it; rank i % n has text i.

    Returns:
        [N, K] logits, fp32, on every rank.
    """
    step = ranks.world_size()
    mine = texts[ranks.rank() :: step]
    found = ranks.attempt(lambda: logits_of_texts(model, tokenizer, mine, batch_size, limit, precision))
    logits = torch.zeros(len(texts), model.config.num_labels)
    for index, (part, message) in enumerate(ranks.gather(found)):
        if message is not None:  # told by all ranks: none waits for one that has gone
            raise UserError(message)
        logits[index::step] = part
    return logits


def _check_lengths(model: Any, lengths: Sequence[int], places: Sequence[str]) -> None:
    if 0 in lengths:
        raise UserError(f'{places[lengths.index(0)]}: found no token; expected text')
    longest = max(lengths, default=0)
    if longest > (positions := _positions(model, longest)):
        raise UserError(
            f'{places[lengths.index(longest)]}: found {longest:,} tokens; expected at most {positions:,}, '
            'the positions that the model has'
        )


def _positions(model: Any, length: int) -> float:
    """How many positions a model can read: as many as its table of them holds; without a table, any number."""
    config = getattr(model.config, 'backbone', None) or model.config
    most, words = (getattr(config, name, None) for name in ('max_position_embeddings', 'vocab_size'))
    if not isinstance(most, int) or length <= most:
        return math.inf
    if not isinstance(model, nn.Module):  # ONNX
        with torch.device('meta'):
            model = AutoModel.from_config(config)
    tables = [item.num_embeddings for item in model.modules() if isinstance(item, nn.Embedding)]
    tables += [len(buffer) for buffer in model.buffers() if buffer.dim() > 1]
    spare = 8  # some tables begin with a few positions for padding
    return most if any(most <= size <= most + spare and size != words for size in tables) else math.inf


def _batches_by_length(lengths: Sequence[int], batch_size: int, padding: float) -> Iterator[list[int]]:
    """Indices of rows, sorted by ``lengths`` in tokens and cut into batches of at most ``batch_size``.

    Those of a batch take at most so much ``padding``, in tokens; more would cost more than another batch's pass.
    """
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        longest = lengths[index]
        if batch and (len(batch) == batch_size or longest * len(batch) - real > padding):
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += longest
    if batch:
        yield batch
