"""Count what a run has read so far: real tokens, padding, and rationales that did not fit."""

from collections.abc import Mapping
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from dhrd_plugin.models.composer_model import RETURN_REASONING_LOSS
from dhrd_plugin.models.extent import Extent
from dhrd_plugin.models.heads import upto
from dhrd_plugin.models.network import DualHeadNetwork


def count_padding(batch: Mapping[str, Any], network: DualHeadNetwork | None = None) -> Tensor:
    """Count the tokens that a network runs of a microbatch, and how many of them are padding.

    It runs the columns in which any row has a real token; where the reasoning loss is not asked for, a
    rationale's tokens do not count as real (:meth:`.DualHeadNetwork.forward`).

    Args:
        batch: of :class:`~dhrd_plugin.TripletCollator`, with what the algorithm asked for.
        network: which may run the real tokens alone. Default: one that runs the padding too.

    Returns:
        [2] whole numbers, on the CPU: tokens run, padding.
    """
    mask, spans = batch['attention_mask'], batch.get('spans')
    reason = bool(batch.get(RETURN_REASONING_LOSS)) and 'reasoning_labels' in batch
    if spans:
        extent = Extent.of(spans, reason)
    else:
        extent = Extent.read(mask if reason else mask * upto(mask, batch['pool_index']))
    run = len(mask) * (extent.last - extent.first)
    if network is not None and network.runs_unpadded(extent):
        run = extent.tokens
    return torch.tensor([run, run - extent.tokens])


class TokenCounter(Callback):
    """Counts real tokens, padding and cut rationales over all ranks; logs them as ``dhrd/...`` after each epoch.

    Real tokens are Composer's own count, which its checkpoints hold. The others are counted here;
    ``dhrd/padding`` is the share of padding in all tokens that the network ran in training, from 0 to 1.

    Attributes:
        cuts: this rank's counts of ``rationales_cut`` and ``rationale_tokens_cut``.
        ran: [2] tokens that this rank ran, and how many of them were padding.
    """

    def __init__(self) -> None:
        self.cuts = {'rationales_cut': 0, 'rationale_tokens_cut': 0}
        self.ran = torch.zeros(2, dtype=torch.long)
        self._ran_before = self.ran  # this batch

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Count the cuts in one batch of this rank."""
        del logger
        cut = state.batch.get('rationale_cut')
        if cut is not None:
            self.cuts['rationales_cut'] += int((cut > 0).sum())
            self.cuts['rationale_tokens_cut'] += int(cut.sum())

    def batch_start(self, state: State, logger: Logger) -> None:
        """Remember the counts of the batches before."""
        del state, logger
        self._ran_before = self.ran

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Count a batch anew that did not fit into memory and is retried."""
        del state, logger
        self.ran = self._ran_before

    def before_forward(self, state: State, logger: Logger) -> None:
        """Count the padding in one microbatch of this rank."""
        del logger
        model: Any = getattr(state.model, 'module', state.model)
        self.ran = self.ran + count_padding(state.batch, model.network)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Log the counts of all ranks."""
        self._log(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log them once more, and keep them in ``final``."""
        self.final = self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> dict[str, float]:
        counts = self._of_all_ranks()
        run, padding = counts.pop('tokens_run'), counts.pop('padding_run')
        counts = {'tokens': int(state.timestamp.token), 'padding': padding / run if run else 0.0, **counts}
        logger.log_metrics({f'dhrd/{name}': value for name, value in counts.items()})
        return counts

    def _of_all_ranks(self) -> dict[str, int]:
        run, padding = self.ran.tolist()
        gathered = dist.all_gather_object({**self.cuts, 'tokens_run': run, 'padding_run': padding})
        return {name: sum(counts[name] for counts in gathered) for name in gathered[0]}

    def state_dict(self) -> dict[str, Any]:
        """The counts of all ranks: a checkpoint holds what rank 0 says. Composer asks every rank for its state."""
        return self._of_all_ranks()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting, with the sum of all ranks on rank 0."""
        if dist.get_global_rank() != 0:
            state = {}
        self.cuts = {name: state.get(name, 0) for name in self.cuts}
        # A checkpoint of an older version does not hold them.
        self.ran = torch.tensor([state.get('tokens_run', 0), state.get('padding_run', 0)])
