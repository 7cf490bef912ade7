"""What a run shows while it lasts: a bar for each stage on a terminal, plain lines elsewhere.

Composer's ProgressBarLogger shows neither the loss of each head, nor real tokens a second, nor the time left; it prints
the whole config, and off a terminal its bars fill the log. SpeedMonitor and RuntimeEstimator write to every logger.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from composer.core import Callback, Event, State, Time, Timestamp, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import create_interval_scheduler, dist
from torch import Tensor
from tqdm import tqdm

from dhrd_plugin.callbacks.token_counter import TokenCounter
from dhrd_plugin.training.config import Config

RECENT = 50  # batches over which speed and padding are shown
BAR = '{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}'
_LOSS = 'loss/train/'


class Mark(NamedTuple):
    """Where a run stood: seconds of training, without evaluation; real tokens of all ranks; what this rank ran."""

    seconds: float
    tokens: int
    ran: Tensor


class Display(LoggerDestination):
    """Shows on rank 0 the stage, the loss of each head, alpha, tokens a second, share of padding and time left.

    Losses and alpha are those of the last batch. Tokens are real ones, of all ranks, and are counted without the
    time of evaluations; the share of padding is rank 0's (``dhrd/padding`` is that of all ranks). Both are of the
    last 50 batches. The time left is that of the whole fit, at its pace so far, evaluations included.

    Args:
        counter: of the same trainer.
        mode: ``'bars'``; ``'lines'``, one at each interval, at the end of training and of each evaluation; or
            ``None``, which shows nothing.
        interval: a Composer time string, for lines. Default: every epoch.
    """

    def __init__(self, counter: TokenCounter, mode: str | None, interval: str = '1ep'):
        self.counter = counter
        self.mode = mode if dist.get_global_rank() == 0 else None
        self.stream = sys.stderr
        ends = {Event.BATCH_END, Event.EPOCH_END}
        self._due = create_interval_scheduler(interval, checkpoint_events=False, final_events=ends)
        self._last_line = -1  # the batch that it told of
        self._metrics: dict[str, Any] = {}
        self._losses: dict[str, float] = {}
        self._bars: dict[str, tqdm] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the last values; they are read when they are shown."""
        self._metrics.update(metrics)
        self._losses = losses_by_head(metrics) or self._losses

    def fit_start(self, state: State, logger: Logger) -> None:
        """Time begins here."""
        self._cold = True
        self._start(state)

    def _start(self, state: State) -> None:
        self._marks = deque([self._mark(state)], maxlen=RECENT + 1)
        self._begun = time.monotonic(), share_done(state, state.timestamp)

    def _mark(self, state: State) -> Mark:
        timestamp = state.timestamp
        return Mark(timestamp.total_wct.total_seconds(), int(timestamp.token), self.counter.ran)

    def _facts(self) -> list[str]:
        # The only place that reads from the device.
        facts = [f'{head} {loss:.4f}' for head, loss in self._losses.items()]
        if 'dhrd/alpha' in self._metrics:
            facts.append(f'alpha {self._metrics["dhrd/alpha"]:.3g}')
        first, last = self._marks[0], self._marks[-1]
        if last.seconds > first.seconds:
            facts.append(f'{(last.tokens - first.tokens) / (last.seconds - first.seconds):,.0f} tok/s')
        run, padding = (last.ran - first.ran.to(last.ran.device)).tolist()
        if run:
            facts.append(f'padding {100 * padding / run:.1f} %')
        return facts

    def _left(self, state: State, timestamp: Timestamp) -> list[str]:
        begun, share = self._begun
        done = share_done(state, timestamp)
        if done <= share:
            return []
        seconds = (time.monotonic() - begun) * (1 - done) / (done - share)
        return [f'{tqdm.format_interval(max(seconds, 0))} left']

    # ----------------------------------------------------------------------------------- training

    def batch_start(self, state: State, logger: Logger) -> None:
        """Open the epoch's bar; a resumed run begins within an epoch."""
        if 'train' not in self._bars:
            epoch, batches = find_epoch(state, state.timestamp)
            self._open('train', f'train {epoch}', batches, int(state.timestamp.batch_in_epoch))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Move the bar on, or write a line where it is time to."""
        self._marks.append(self._mark(state))
        if 'train' in self._bars and self._bars['train'].update():
            self._fill(state, state.timestamp)
        self._line(Event.BATCH_END, state, state.timestamp)
        if self._cold:  # the first batch fills caches and compiles: from here on it does not count
            self._cold = False
            self._start(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Close the bar, or write a line; the timestamp is that of the next epoch already."""
        assert state.previous_timestamp is not None
        self._line(Event.EPOCH_END, state, state.previous_timestamp)
        self._end_training(state, state.previous_timestamp)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Close what is open: a fit may end within an epoch."""
        self._end_training(state, state.timestamp)
        self._close_all()

    def _end_training(self, state: State, timestamp: Timestamp) -> None:
        if 'train' in self._bars:
            self._fill(state, timestamp)
            self._close('train')

    def _fill(self, state: State, timestamp: Timestamp) -> None:
        facts = [*self._left(state, timestamp), *self._facts()]  # a narrow terminal cuts the end
        self._bars['train'].set_postfix_str(', '.join(facts))

    def _line(self, event: Event, state: State, timestamp: Timestamp) -> None:
        batch = int(timestamp.batch)
        if self.mode != 'lines' or not self._due(state, event) or batch == self._last_line:
            return
        self._last_line = batch
        epoch, batches = find_epoch(state, timestamp)
        of = '' if batches is None else f'/{batches}'
        facts = [*self._facts(), *self._left(state, timestamp)]
        self._say(f'train {epoch} batch {int(timestamp.batch_in_epoch)}{of}: {", ".join(facts)}')

    # --------------------------------------------------------------------------------- evaluation

    def eval_start(self, state: State, logger: Logger) -> None:
        """Open a bar, below that of the training."""
        batches = state.dataloader_len
        self._open('eval', f'eval {state.dataloader_label}', None if batches is None else int(batches))

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Move it on."""
        if 'eval' in self._bars:
            self._bars['eval'].update()

    def eval_end(self, state: State, logger: Logger) -> None:
        """One line with the metrics, on a terminal as well, in the place of the bar."""
        self._close('eval')
        if self.mode is not None:
            prefix = f'metrics/{state.dataloader_label}/'
            found = {name: value for name, value in self._metrics.items() if name.startswith(prefix)}
            values = [f'{name.removeprefix(prefix)} {float(value):.4f}' for name, value in found.items()]
            self._say(f'eval {state.dataloader_label}: {", ".join(values)}')

    # --------------------------------------------------------------------------------------- bars

    def _open(self, stage: str, name: str, total: int | None = None, initial: int = 0) -> None:
        if self.mode == 'bars':
            self._bars[stage] = tqdm(
                desc=name,
                total=total,
                initial=initial,
                leave=stage == 'train',
                file=self.stream,
                dynamic_ncols=True,
                miniters=1,
                bar_format=BAR if total else '{desc}{postfix}',
            )

    def _close(self, stage: str) -> None:
        if stage in self._bars:
            self._bars.pop(stage).close()

    def _say(self, line: str) -> None:
        tqdm.write(line, file=self.stream)  # above the bars, where there are any

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End what is drawn where the ``with`` block ends, by an error too: what is said next has its own line."""
        try:
            yield
        finally:
            self._close_all()

    def _close_all(self) -> None:
        for stage in reversed([*self._bars]):
            self._close(stage)

    def close(self, state: State, logger: Logger) -> None:
        """End what is drawn."""
        self._close_all()


class AnnounceExport(Callback):
    """Names the export among the stages of a display, which is told of the fit's end after all callbacks."""

    def __init__(self, display: Display):
        self.display = display

    def fit_end(self, state: State, logger: Logger) -> None:
        """A bar without a count, until the display hears of the end."""
        self.display.fit_end(state, logger)
        self.display._open('export', 'export')


def losses_by_head(metrics: Mapping[str, float]) -> dict[str, float]:
    """The heads' losses among the metrics of a batch; empty where there are none."""
    losses = {name.removeprefix(_LOSS): loss for name, loss in metrics.items() if name.startswith(_LOSS)}
    total = losses.pop('total', None)
    return losses if losses or total is None else {'classification': total}  # the pooled baseline has one head


def steps_of_fit(max_duration: Time | None, batches: int | None) -> int | None:
    """How many steps a fit takes, of so many batches an epoch; ``None`` where its duration does not tell."""
    if max_duration is None or max_duration.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
        return None
    if max_duration.unit == TimeUnit.BATCH:
        return max_duration.value
    return batches and max_duration.value * batches


def find_epoch(state: State, timestamp: Timestamp) -> tuple[str, int | None]:
    """``epoch 2/3``, as far as it is known of how many, and how many batches the run takes of it."""
    length = None if state.dataloader_len is None else int(state.dataloader_len)
    epoch = int(timestamp.epoch)
    steps = steps_of_fit(state.max_duration, length)
    if not steps or not length:
        return f'epoch {epoch + 1}', length
    return f'epoch {epoch + 1}/{-(-steps // length)}', min(length, steps - epoch * length)


def share_done(state: State, timestamp: Timestamp) -> float:
    """How much of the fit is behind, from 0 to 1."""
    assert state.max_duration is not None
    unit = state.max_duration.unit
    done = float(timestamp.get(unit).value)
    if unit == TimeUnit.EPOCH and state.dataloader_len:
        done += int(timestamp.batch_in_epoch) / int(state.dataloader_len)
    return done / state.max_duration.value if state.max_duration.value else 1.0  # a stopper's, before the first step


def display_mode(config: Config) -> str | None:
    """Bars on a terminal, lines elsewhere; nothing of ours where ``log_to_console`` asks for Composer's own lines."""
    if config.log_to_console:
        return None
    if config.progress_bar and sys.stderr.isatty():
        return 'bars'
    return None if config.log_to_console is False else 'lines'
