"""What a run has read so far: real tokens, and rationales that did not fit."""

from typing import Any

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
        counts = {'tokens': int(state.timestamp.token), **self._of_all_ranks()}
        logger.log_metrics({f'dhrd/{name}': value for name, value in counts.items()})
        return counts

    def _of_all_ranks(self) -> dict[str, int]:
        gathered = dist.all_gather_object(self.cuts)
        return {name: sum(cuts[name] for cuts in gathered) for name in self.cuts}

    def state_dict(self) -> dict[str, Any]:
        """The cuts of all ranks: a checkpoint holds what rank 0 says. Composer asks every rank for its state."""
        return self._of_all_ranks()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting, from the sum on rank 0."""
        self.cuts = {name: state[name] if dist.get_global_rank() == 0 else 0 for name in self.cuts}
