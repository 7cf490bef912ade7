"""What Composer's evaluators have measured, and of which weights it is."""

import copy
import warnings

from composer.algorithms import EMA, SWA
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from torchmetrics import Metric


class Evaluations(Callback):
    """Notes after which batch each evaluation set was measured, so that no figure is told of other weights."""

    def __init__(self) -> None:
        self._batches: dict[str, int] = {}  # by evaluation set

    def fit_start(self, state: State, logger: Logger) -> None:
        """Forget what was measured in a fit before, whose time was reset."""
        self._batches = {label: batch for label, batch in self._batches.items() if batch == int(state.timestamp.batch)}

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note the batch."""
        self._batches[str(state.dataloader_label)] = int(state.timestamp.batch)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Forget the evaluation of weights that an algorithm has just averaged."""
        if any(map(_averages_epochs, state.algorithms)):
            self._batches.clear()

    def is_of_now(self, label: str, state: State) -> bool:
        """Whether the weights of now are those that this set has measured."""
        return self._batches.get(label) == int(state.timestamp.batch)

    def metrics(self, state: State) -> dict[str, dict[str, float]]:
        """Compute the metrics of the weights of now. Every rank has to call it.

        Returns:
            Values by evaluation set and metric's name, of those metrics that are one number.
        """
        return {
            label: {name: value for name, metric in metrics.items() if (value := value_of(metric)) is not None}
            for label, metrics in state.eval_metrics.items()
            if self.is_of_now(label, state)
        }


def value_of(metric: Metric) -> float | None:
    """A metric's value; ``None`` of one that is several numbers, as a confusion matrix is, or a value of each class."""
    value = metric.compute()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor's
        return None


def may_be_number(metric: Metric) -> bool:
    """Whether a metric's value is one number, by what it gives of no rows; where it gives nothing, it may be."""
    alone = copy.deepcopy(metric)
    alone.distributed_available_fn = lambda: False  # this rank may be the only one that asks
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it has seen no rows
        try:
            return value_of(alone) is not None
        except Exception:
            return True


def _averages_epochs(algorithm: Algorithm) -> bool:
    """Whether the algorithm changes the weights, or those that are evaluated, at the end of an epoch."""
    of_ema = isinstance(algorithm, EMA) and algorithm.update_event
    of_swa = isinstance(algorithm, SWA) and algorithm.match_event
    return Event.EPOCH_END in (of_ema, of_swa)
