"""Triplets out of MDS shards: streamed for training, map-style for evaluation."""

import hashlib
from typing import Any

from streaming import StreamingDataset
from torch.utils.data import Dataset

from dhrd_plugin.errors import UserError

REQUIRED_COLUMNS = ('id', 'input_text', 'label')


def draw_rationale(rationale: Any, row_id: str, epoch: int, seed: int) -> str | None:
    """One of several rationales, a pure function of seed, epoch and row (ours, not the paper's)."""
    if not isinstance(rationale, list):
        return rationale
    if not rationale:
        return None
    digest = hashlib.sha256(f'{seed}/{epoch}/{row_id}'.encode()).digest()
    return rationale[int.from_bytes(digest[:8], 'big') % len(rationale)]


class StreamingTripletDataset(StreamingDataset):
    """A StreamingDataset whose rows are triplets.

    Args:
        rationale_seed: seeds the draw among several rationales of a row. Default: 0.
        **kwargs: of :class:`streaming.StreamingDataset`: ``local``, ``remote``, ``streams``,
            ``batch_size`` (the device's), ``shuffle`` and so on.

    Raises:
        UserError: the shards lack a column of a triplet.
    """

    def __init__(self, *, rationale_seed: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        self.rationale_seed = rationale_seed
        self._epoch = 0
        check_columns(self.shards[0].column_names, kwargs.get('local') or kwargs.get('remote') or 'streams')  # pyright: ignore

    def _resume_incr_epoch(self) -> tuple[int, int]:
        # The one place where every worker learns which epoch it reads.
        self._epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self._epoch, sample_in_epoch

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """One triplet."""
        row = super().get_item(sample_id, retry)
        row['rationale'] = draw_rationale(row.get('rationale'), row['id'], self._epoch, self.rationale_seed)
        return row


class MapTriplets(Dataset):
    """Triplets by index, each exactly once, for evaluation with a distributed sampler.

    A StreamingDataset on several ranks repeats rows to make them even; a sampler's repeats are
    known to Composer, which leaves them out of the metrics.

    Args:
        rows: anything with ``len`` and integer indices: ``streaming.LocalDataset``,
            :class:`StreamingTripletDataset`, a list.
    """

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return getattr(self.rows, 'num_samples', None) or len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def check_columns(names: list[str], where: str) -> None:
    """Refuse shards that do not hold triplets.

    Raises:
        UserError: naming the column.
    """
    for name in REQUIRED_COLUMNS:
        if name not in names:
            raise UserError(f'{where}: found columns {sorted(names)}; expected triplets, with a column {name!r}')
