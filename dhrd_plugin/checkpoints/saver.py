"""What Composer's checkpoints lack: a stop on SIGTERM, failures told on every rank, dropout as it would have been."""

import shutil
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple, get_save_filename
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from tqdm import tqdm

from dhrd_plugin import files
from dhrd_plugin.checkpoints.whole import INDEX, find_flaw
from dhrd_plugin.errors import UserError, one_line

STOPPED = 128 + signal.SIGTERM  # the exit status after a SIGTERM, 143, as Composer's own


class SafeCheckpoints(Callback):
    """Guards Composer's checkpoint savers, on any number of ranks.

    After a SIGTERM to any rank, every rank ends the batch (and the evaluation due after it), saves
    a checkpoint, waits for its upload and exits with status 143. The export is left to the run that goes on.
    The ``composer`` command passes a SIGTERM on to its ranks, and gives them 30 seconds.

    A checkpoint that rank 0 cannot write, on a full disk say, ends every rank with the same one line
    instead of leaving the others to wait; what was written of it is removed, older ones stay.

    A loss that is not finite, on any rank, ends every rank before a weight is changed by it; the weights before
    it are saved.

    Without a saver (``save_folder`` of the Trainer, or a ``CheckpointSaver``) it looks at the loss alone.

    Raises:
        UserError: while training, where a checkpoint cannot be written, or a loss is not finite.
        SystemExit: while training, after a SIGTERM.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._previous: Any = None
        self._losses: Any = 0.0  # of a batch; on the device, where it is not waited for
        self._begun = 0  # the batch that the run began with, of which there is nothing to save
        self._shift: Any = None  # of SAM in the batch before

    def fit_start(self, state: State, logger: Logger) -> None:
        """Listen for SIGTERM from here on."""
        self._begun = int(state.timestamp.batch)
        savers = _savers(state)
        for saver in savers:
            # Composer looks every 30 s whether an upload is there, before it moves the remote `latest`
            # to it: as long as schedulers wait between SIGTERM and SIGKILL.
            saver._symlink_upload_wait_before_next_try_in_seconds = 1
        if savers:
            self._previous = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self._signalled = True

    def batch_start(self, state: State, logger: Logger) -> None:
        """Begin a batch."""
        self._losses = 0.0
        shift = _sams_shift(state)
        self._shift = shift if shift is None else weakref.ref(shift)

    def after_loss(self, state: State, logger: Logger) -> None:
        """Note a microbatch's loss."""
        losses = state.loss.values() if isinstance(state.loss, Mapping) else ensure_tuple(state.loss)
        self._losses = self._losses + sum(loss.detach().float().sum() for loss in losses)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Stop where a loss of the batch was not finite; the optimizer has not stepped yet."""
        if _on_any_rank(~torch.as_tensor(self._losses).isfinite(), state):
            found = f'loss: found one that is not finite in batch {int(state.timestamp.batch) + 1}'
            expected = 'expected a number (a lower learning rate, or gradient_clipping, may give one)'
            if _sams_shift(state) is not (self._shift and self._shift()):  # a new one: this is the second pass
                for optimizer in state.optimizers:
                    optimizer.sub_e_w()  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError(f'{found}; {expected}{self._save_all(state, logger)}')

    def _save_all(self, state: State, logger: Logger) -> str:
        saved = ''
        for saver in _savers(state):
            saver.save_interval = lambda state, event: True
            if int(state.timestamp.batch) > self._begun:
                save(saver, Event.BATCH_CHECKPOINT, state, logger)
                saved = f'; the weights before it: {_place(saver, state)}'
            saver.fit_end(state, logger)  # waits for what is being uploaded
        return saved

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save where it is time to, and stop where that was asked for."""
        self._checkpoint(Event.BATCH_CHECKPOINT, state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save where it is time to, and stop where that was asked for."""
        self._checkpoint(Event.EPOCH_CHECKPOINT, state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """A SIGTERM ends the process at once again: everything is saved."""
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """As :meth:`fit_end`."""
        # Only the main thread may; Composer closes also where a trainer is collected.
        if self._previous is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _checkpoint(self, event: Event, state: State, logger: Logger) -> None:
        savers = _savers(state)
        stop = bool(savers) and _on_any_rank(self._signalled, state)
        for saver in savers:
            if stop:
                saver.save_interval = lambda state, event: True
            save(saver, event, state, logger)
        if stop:
            for saver in savers:
                saver.fit_end(state, logger)  # waits for what is being uploaded
            self.close(state, logger)
            if dist.get_global_rank() == 0:
                # Above the bars of a terminal.
                tqdm.write(f'SIGTERM: saved a checkpoint at batch {state.timestamp.batch.value} and stopped')
            raise SystemExit(STOPPED)


def _on_any_rank(flag: Any, state: State) -> bool:
    """Whether a flag, a bool or a tensor of one, is set on any rank. Every rank has to call it."""
    found = state.device.tensor_to_device(torch.as_tensor(flag).int())
    dist.all_reduce(found, reduce_operation='MAX')
    return bool(found)


class _Failure(NamedTuple):
    """What a rank met while it saved: where, what, and whether the operating system refused."""

    path: str
    reason: str
    refused: bool


def save(saver: CheckpointSaver, event: Event, state: State, logger: Logger) -> None:
    """Run an event of a saver; where it fails on one rank, it fails on all of them.

    Raises:
        UserError: the operating system refused to write.
        RuntimeError: on the other ranks, for any other failure; the rank itself raises what it met.
    """
    last, written = saver.last_checkpoint_batch, saver.symlink_count
    failure = None
    try:
        with _ctrl_c_waits():
            saver.run_event(event, state, logger)
    except Exception as error:
        failure = error
        if saver.symlink_count == written:
            _remove(saver, state)
            if not state.fsdp_sharded_state_dict_enabled:
                # In `_save_checkpoint` the other ranks wait for rank 0's file, and then for its name.
                dist.barrier()
                if saver.remote_uploader is not None:
                    dist.all_gather_object([])
    if saver.last_checkpoint_batch is last:
        return  # it was not time to save
    gathered = dist.all_gather_object(failure and _Failure(str(_path(saver, state)), *_reason(failure)))
    # Of a rank that failed later than Composer's own gathering began, the others' lists of files.
    met = next((found for found in gathered if isinstance(found, _Failure)), None)
    if met and met.refused:
        raise UserError(
            f'save_folder: {met.path}: cannot be written: {met.reason}; the checkpoints before it are as they were'
        ) from failure
    if met:
        raise failure or RuntimeError(f'{met.path}: cannot be saved: {met.reason}')
    if saver.remote_uploader is not None:
        files.remove(_path(saver, state))  # the uploader has a copy of its own, and Composer would keep this for ever
        saver.saved_checkpoints.clear()


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Inside, a Ctrl-C is kept until the end: torch's writer aborts the process where it is interrupted in a write."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *found: kept.append(found))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if kept and callable(before):
        before(*kept[0])


def _sams_shift(state: State) -> Tensor | None:
    """What Composer's SAM added to a weight in its last first pass of a batch."""
    entries = (entry for optimizer in state.optimizers for entry in optimizer.state.values())
    return next((entry['e_w'] for entry in entries if 'e_w' in entry), None)


def _savers(state: State) -> list[CheckpointSaver]:
    return [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]


def _path(saver: CheckpointSaver, state: State) -> Path:
    """The file, or for sharded checkpoints the folder, that the saver writes now."""
    if not state.fsdp_sharded_state_dict_enabled:
        return Path(saver.filename.format(state))
    return Path(get_save_filename(state, saver.filename.format(state, keep_placeholders=True))).parent


def _place(saver: CheckpointSaver, state: State) -> str:
    """Where a checkpoint is kept: its address, where there is one."""
    path = _path(saver, state)
    uploader = saver.remote_uploader
    return str(path) if uploader is None else f'{uploader.remote_folder.rstrip("/")}/{path.name}'


def _remove(saver: CheckpointSaver, state: State) -> None:
    path = _path(saver, state)
    if path.is_dir() and not (path / INDEX).exists():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_file() and dist.get_global_rank() == 0 and find_flaw(str(path)):
        path.unlink()


def _reason(error: BaseException) -> tuple[str, bool]:
    """In one line, and whether the operating system refused; torch and Composer wrap what it says."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]
    if isinstance(error, OSError):
        return error.strerror or str(error), True
    return one_line(error, kind=True), False
