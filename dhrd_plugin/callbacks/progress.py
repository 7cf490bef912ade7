"""What a run has read so far: real tokens, and rationales that did not fit."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist


class TokenCounter(Callback):
    """Counts real tokens and cut rationales over all ranks, and logs them as ``dhrd/...`` at each epoch's end.

    Real tokens are Composer's own count, which its checkpoints hold. The cuts are counted here.
    """

    def __init__(self) -> None:
        self.cuts = {'rationales_cut': 0, 'rationale_tokens_cut': 0}

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Count one batch of this rank."""
        del logger
        cut = state.batch.get('rationale_cut')
        if cut is not None:
            self.cuts['rationales_cut'] += int((cut > 0).sum())
            self.cuts['rationale_tokens_cut'] += int(cut.sum())

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Log the counts of all ranks."""
        self._log(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log them once more, and keep them in ``final``."""
        self.final = self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> dict[str, int]:
        cuts = state.device.tensor_to_device(torch.tensor(list(self.cuts.values())))
        dist.all_reduce(cuts)
        counts = {'tokens': int(state.timestamp.token), **dict(zip(self.cuts, cuts.tolist()))}
        logger.log_metrics({f'dhrd/{name}': value for name, value in counts.items()})
        return counts

    def state_dict(self) -> dict[str, Any]:
        """The cuts of this rank."""
        return dict(self.cuts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.cuts.update(state)
