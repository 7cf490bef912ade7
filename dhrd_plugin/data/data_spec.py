"""A batch of triplets as Composer counts and cuts it."""

from typing import Any

from composer.core import DataSpec
from torch import Tensor
from torch.utils.data import DataLoader


def triplet_data_spec(dataloader: DataLoader, by_length: bool = False) -> DataSpec:
    """Tell Composer how many samples and real tokens a batch of triplets holds, and how to cut it.

    ``loss_generating`` tokens are declared as samples: both losses are means over samples, so with
    ``accumulate_train_batch_on_tokens`` (llm-foundry's default) the gradient stays the same.

    Args:
        dataloader: yields batches of :class:`TripletCollator`.
        by_length: cut a training batch into microbatches of similar length, which pads less and
            changes no gradient. Never for evaluation, where Composer drops a batch's last rows.
            Default: False.
    """
    return DataSpec(
        dataloader,
        get_num_samples_in_batch=lambda batch: len(batch['labels']),
        get_num_tokens_in_batch=_count_tokens,  # pyright: ignore[reportArgumentType]
        split_batch=split_by_length if by_length else split,
    )


def _count_tokens(batch: dict[str, Any]) -> dict[str, int]:
    return {'total': int(batch['attention_mask'].sum()), 'loss_generating': len(batch['labels'])}


def split(batch: dict[str, Any], microbatch_size: float) -> list[dict[str, Any]]:
    """Cut a batch into microbatches of so many rows, the last perhaps of fewer, in the order of the rows."""
    size = int(microbatch_size)
    starts = range(0, len(batch['labels']), size)
    return [{key: value[start : start + size] for key, value in batch.items()} for start in starts]


def split_by_length(batch: dict[str, Any], microbatch_size: float) -> list[dict[str, Any]]:
    """Cut a batch as :func:`split` does, the rows sorted by their number of real tokens."""
    order = batch['attention_mask'].sum(1).argsort(stable=True)
    return split({key: _in_order(value, order) for key, value in batch.items()}, microbatch_size)


def _in_order(rows: Tensor | list, order: Tensor) -> Tensor | list:
    if not isinstance(rows, Tensor):
        return [rows[index] for index in order.tolist()]
    # Pinned memory, which a copy to a GPU does not wait for, stays pinned.
    return rows[order].pin_memory() if rows.is_pinned() else rows[order]
