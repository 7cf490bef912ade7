"""Export the slim classifier at the end of the fit, and at intervals on request."""

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer.algorithms import EMA
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State, Timestamp
from composer.distributed.prepare_distributed import get_full_state_dict
from composer.loggers import FileLogger, Logger, TensorboardLogger
from composer.models import HuggingFaceModel
from composer.models.huggingface import maybe_get_underlying_model
from composer.utils import create_interval_scheduler, format_name_with_dist, format_name_with_dist_and_time
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DistributedSampler
from torchmetrics import Metric

from dhrd_plugin.calibration import calibrate as fit_calibration
from dhrd_plugin.callbacks.evaluations import Evaluations, may_be_number
from dhrd_plugin.errors import UserError
from dhrd_plugin.export.best import best_path, is_better, keep, read_kept
from dhrd_plugin.export.int8 import ROWS, Row, rows_of
from dhrd_plugin.export.mlflow import MlflowTarget, mlflow_logger
from dhrd_plugin.export.onnx import check_onnx
from dhrd_plugin.export.place import check_place
from dhrd_plugin.export.targets import HubTarget, RemoteTarget
from dhrd_plugin.export.write import DTYPES, add_onnx, check_described, network_state, write_slim
from dhrd_plugin.losses import IGNORE_INDEX
from dhrd_plugin.models.build import is_sequence_classifier
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier, describe
from dhrd_plugin.problem_type import is_known
from dhrd_plugin.ranks import gather, on_rank_zero
from dhrd_plugin.streams.remote import check_address
from dhrd_plugin.times import parse_interval

HeldOut = tuple[Tensor, Tensor]  # logits [N, K] and labels [N], of several labels [N, K]
log = logging.getLogger(__name__)


def _gather_network_state(model: nn.Module) -> dict[str, Tensor]:
    """The network's whole state on the CPU of rank 0, from one process, DDP or FSDP; empty elsewhere.

    Every rank has to call it. In one process the tensors are the live ones.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # Of a model with adapters HuggingFaceModel would give the adapters alone.
    with get_full_state_dict(getattr(model, 'module', model)):
        return network_state(get_model_state_dict(model, options=options))


@contextmanager
def _averaged_weights(state: State) -> Iterator[None]:
    """Give the model the weights that evaluation measures: the averages of Composer's EMA where it runs."""
    averages = [
        algorithm.ema_model
        for algorithm in state.algorithms
        if isinstance(algorithm, EMA) and algorithm.ema_started and not algorithm.ema_weights_active
    ]
    for average in averages:
        average.swap_params(state.model)  # pyright: ignore[reportOptionalMemberAccess]
    try:
        yield
    finally:
        for average in averages:
            average.swap_params(state.model)  # pyright: ignore[reportOptionalMemberAccess]


def _is_sharded(state: State) -> bool:
    """Whether this rank holds parts of the weights only, so that it cannot run the model alone."""
    return state.fsdp_enabled or any(isinstance(parameter, DTensor) for parameter in state.model.parameters())


def check_exportable(model: nn.Module) -> None:
    """Refuse a model that cannot be exported as a classifier."""
    if isinstance(model, ComposerDualHeadClassifier):
        return
    if not isinstance(model, HuggingFaceModel) or not is_sequence_classifier(maybe_get_underlying_model(model.model)):
        raise UserError(
            f'drop_reasoning_head: found a model of type {type(model).__name__}; expected a ComposerDualHeadClassifier '
            'or a HuggingFaceModel around a ...ForSequenceClassification'
        )


def _metadata(model: Any) -> dict[str, Any]:
    """What :func:`~dhrd_plugin.export.write.write_slim` builds the model from."""
    return model.get_metadata() if isinstance(model, ComposerDualHeadClassifier) else describe(model)


class DropReasoningHead(Callback):
    """Writes the slim classifier at the end of the fit: backbone, classification head, tokenizer, model card.

    The live model is left as it is: it can go on training, be evaluated and be saved. Beside Composer's
    EMA the averaged weights are written, those that it evaluates. The folder holds safetensors and
    appears whole or not at all, once it answers a few rows as the live model does. Its card tells the metrics
    of an evaluation after the same batch, and of no other. Rank 0 writes; where it fails, every rank ends with
    its error.

    Args:
        output_dir: the folder to write. Placeholders as in Composer's ``save_folder`` and
            ``save_filename``: ``{run_name}``, ``{epoch}``, ``{batch}`` ...
        dtype: ``'fp32'``, ``'bf16'`` or ``'fp16'``. Default: as trained.
        every: a Composer time string such as ``'1ep'`` or ``'500ba'``; exports at this interval
            besides, each in the place of the last unless ``output_dir`` names the time. Default: never.
        remote: where to upload the folder, such as ``s3://bucket/rte/slim``, by Composer's
            ``RemoteUploader``; the same placeholders. Default: nowhere.
        onnx: ``True`` or ``'fp32'`` adds ``model.onnx``, fp32, of dynamic batch and length, and ``'int8'`` also
            ``model-int8.onnx``, compared with it on the card by 128 rows that were evaluated; needs the extra
            ``onnx``. Where it cannot be made, or does not answer as the model does, the rest is published before the
            run ends. Default: ``False``.
        push_to_hub: a repository of the Hugging Face hub, such as ``org/name``; the token is
            huggingface_hub's (``HF_TOKEN`` or its login). Default: none.
        private: whether that repository is private, where it is created. Default: ``False``.
        mlflow: at the end of the fit, log it as a model of the MLflow run, with its signature
            (:class:`~dhrd_plugin.export.mlflow.MlflowTarget`). Default: where the trainer has Composer's MLFlowLogger.
        mlflow_registered_model_name: register that model under this name besides. Default: not.
        monitor: export the weights of the evaluation with the best value of this metric, as it is called in the log,
            such as ``MulticlassAccuracy``; of equal ones the first. They are kept beside ``output_dir``, in
            ``OUTPUT_DIR.best.pt``, from which a run that is resumed goes on. Default: the last weights.
        mode: whether ``'max'`` or ``'min'`` of it is best. Default: as the metric says of itself.
        dataloader_label: the evaluation set of ``monitor``. Default: the only one.
        calibrate: an evaluation set; at the fit's end a temperature is fitted to the logits that the exported weights
            gave of its rows when they were evaluated, and folded into the last layer. Default: not.

    Raises:
        UserError: an unknown ``dtype`` or ``mode``; a wrong interval; a missing package; and before training, an
            unknown metric or evaluation set, a
            model that cannot be exported, an ``output_dir`` that holds something else than an earlier export, or
            what the trainer writes besides, or that cannot be written, a remote or a hub that refuses, ``mlflow``
            without MLFlowLogger.
    """

    def __init__(
        self,
        output_dir: str,
        dtype: str | None = None,
        every: str | None = None,
        remote: str | None = None,
        onnx: bool | str = False,
        push_to_hub: str | None = None,
        private: bool = False,
        mlflow: bool | None = None,
        mlflow_registered_model_name: str | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        dataloader_label: str | None = None,
        calibrate: str | None = None,
    ):
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f'drop_reasoning_head.dtype: found {dtype!r}; expected one of {list(DTYPES)}')
        if mode not in (None, 'max', 'min'):
            raise UserError(f"drop_reasoning_head.mode: found {mode!r}; expected 'max' or 'min'")
        for key, value in {'mode': mode, 'dataloader_label': dataloader_label}.items():
            if value and not monitor:
                raise UserError(f'drop_reasoning_head.{key}: found without monitor; expected the name of a metric')
        self.output_dir = str(output_dir)
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.onnx = check_onnx('drop_reasoning_head.onnx', onnx)
        self._evaluations = Evaluations()
        self._waits = False  # for Composer's last evaluation, before it exports
        self._due = None
        if every is not None:
            interval = parse_interval(every, 'drop_reasoning_head.every')
            self._due = create_interval_scheduler(interval, include_end_of_training=False)
        self._targets = [RemoteTarget(remote)] if remote else []
        self._targets += [HubTarget(push_to_hub, private)] if push_to_hub else []
        self._mlflow = True if mlflow_registered_model_name else mlflow
        self._registered_name = mlflow_registered_model_name
        self.monitor, self._mode, self._label = monitor, mode, dataloader_label
        self.calibrate = calibrate
        self._rows: list[Row] = []  # of an evaluation, this rank's first, to compare fp32 and int8 on
        self._rows_of = ''  # its evaluation set
        self._best: dict[str, Any] | None = None  # what is kept: metric, value, batch ...
        self._runs: list[str] = []  # the ids of this process, last, and of those that it goes on from
        self._logits: list[HeldOut] = []  # of the evaluation that is running, this rank's
        self._held_out: HeldOut | None = None  # of the last one, all ranks'

    def check_evaluations(self, metrics: Mapping[str, Mapping[str, Metric]]) -> None:
        """Refuse an evaluation set or a metric that there is not; set what was left to their own word.

        Args:
            metrics: those of the run, by evaluation set and name.
        """
        if self.calibrate:
            _check_name('calibrate', self.calibrate, metrics, 'evaluation set')
        if not self.monitor:
            return
        if self._label is None:
            if len(metrics) != 1:
                raise UserError(f'drop_reasoning_head.dataloader_label: missing; {_one_of(metrics, "evaluation set")}')
            self._label = next(iter(metrics))
        _check_name('dataloader_label', self._label, metrics, 'evaluation set')
        _check_name('monitor', self.monitor, metrics[self._label], f'metric of {self._label}')
        if not may_be_number(metrics[self._label][self.monitor]):
            raise UserError(self._no_number())
        if self._mode is None:
            higher = metrics[self._label][self.monitor].higher_is_better
            if higher is None:
                raise UserError(f"drop_reasoning_head.mode: missing; expected 'max' or 'min' of {self.monitor}")
            self._mode = 'max' if higher else 'min'

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation whose weights are exported: ``metric``, ``value``, ``batch`` ...; None: the last weights."""
        return self._best

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse before training what cannot be exported or uploaded."""
        model: Any = getattr(state.model, 'module', state.model)
        check_exportable(model)
        if not _is_sharded(state):  # whose names may be others
            on_rank_zero(lambda: check_described(_metadata(model), model.model.state_dict()))
        self.check_evaluations(state.eval_metrics)
        if self._mlflow and mlflow_logger(logger) is None:
            raise UserError('drop_reasoning_head.mlflow: found without a logger of MLflow; expected loggers.mlflow')
        out, apart = self._named(self.output_dir, state), self._written_by_others(state, logger)
        on_rank_zero(lambda: check_place(out, 'drop_reasoning_head.output_dir', apart))
        for target in self._targets:
            if isinstance(target, RemoteTarget):
                check_address(self._named(target.remote, state), 'drop_reasoning_head.remote')
        self._evaluations.fit_start(state, logger)
        if self._targets:
            on_rank_zero(lambda: [target.check() for target in self._targets] and None)
        if self.monitor:
            self._best = on_rank_zero(lambda: self._find_best(state))
        self._name_run(state)
        if self.monitor:
            self._keep_if_best(state)  # of an evaluation before the first step

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Keep the weights if they are the best, and export where it is time to."""
        del logger
        self._keep_if_best(state)
        self._export_if_due(Event.BATCH_CHECKPOINT, state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Keep the weights if they are the best, and export where it is time to."""
        del logger
        self._keep_if_best(state)
        self._export_if_due(Event.EPOCH_CHECKPOINT, state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Forget the evaluation of weights that an algorithm has just averaged."""
        self._evaluations.epoch_end(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Export, to MLflow as well; where the best or the temperature is asked for, after the last evaluation."""
        self._waits = bool(self.monitor or self.calibrate) and _evaluates_yet(state)
        if not self._waits:
            self._finish(state, logger)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Export, if it is the evaluation that the export waits for."""
        if self._waits:
            self._waits = False
            self._finish(state, logger)

    def _finish(self, state: State, logger: Logger) -> None:
        tracker = None if self._mlflow is False else mlflow_logger(logger)
        self._keep_if_best(state)
        calibrated = self._export(state, [] if tracker is None else [MlflowTarget(tracker, self._registered_name)])
        if self._best is not None and not any(isinstance(part, CheckpointSaver) for part in state.callbacks):
            on_rank_zero(self._best_path(state).unlink)  # nothing to go on from
        if self.calibrate and not calibrated:
            raise UserError(
                f'drop_reasoning_head.calibrate: found no evaluation of {self.calibrate} after the batch that is '
                f'exported; the export in {self._named(self.output_dir, state)} is whole, but not calibrated'
            )

    def _export_if_due(self, event: Event, state: State) -> None:
        if self._due and self._due(state, event):
            self._export(state)

    def _export(self, state: State, targets: Sequence[MlflowTarget] = ()) -> bool:
        """Write the best weights where they are asked for and there are any, else those of now; say if calibrated."""
        model: Any = getattr(state.model, 'module', state.model)
        out = Path(self._named(self.output_dir, state))
        every = [*self._targets, *targets]

        def write(weights: Mapping[str, Tensor], metrics: Any, held_out: HeldOut | None, **options: Any) -> None:
            metadata = _metadata(model)
            calibration = held_out and {'rows_of': self.calibrate, **fit_calibration(*held_out)}
            write_slim(metadata, weights, out, self.dtype, metrics, calibration=calibration, **options)
            try:
                if self.onnx:
                    add_onnx(out, self.onnx, self._rows, self._rows_of)
            finally:  # the rest of it is whole
                for target in every:
                    target.upload(out, lambda name: self._named(name, state))

        def write_best() -> bool:
            kept = read_kept(self._best_path(state))
            del kept['run']
            write(**kept)
            return self._best['calibrated']  # pyright: ignore[reportOptionalSubscript]

        if self._best is not None:
            return on_rank_zero(write_best)
        metrics, held_out = self._evaluations.metrics(state), self._held_out_of_now(state)
        live = None if _is_sharded(state) else model.model
        with _averaged_weights(state):
            weights = _gather_network_state(state.model)
            on_rank_zero(lambda: write(weights, metrics, held_out, live=live))
        return held_out is not None

    def _keep_if_best(self, state: State) -> None:
        """Keep the weights of now where an evaluation of them was better than all before; every rank calls it."""
        if not self.monitor or self._label is None or not self._evaluations.is_of_now(self._label, state):
            return
        metrics, held_out = self._evaluations.metrics(state), self._held_out_of_now(state)
        value = metrics[self._label].get(self.monitor)
        if value is None:  # as only now could be seen
            raise UserError(self._no_number())
        if not is_better(value, self._best['value'] if self._best else None, str(self._mode)):
            return
        best = {
            'metric': self.monitor,
            'dataloader_label': self._label,
            'value': value,
            'batch': int(state.timestamp.batch),
            'epoch': int(state.timestamp.epoch),
            'calibrated': held_out is not None,
        }
        with _averaged_weights(state):
            weights = _gather_network_state(state.model)
            path = self._best_path(state)
            facts = {'run': self._runs[-1], 'best': best, 'metrics': metrics, 'held_out': held_out}
            on_rank_zero(lambda: keep(path, weights, **facts))
        self._best = best

    def _no_number(self) -> str:
        return (
            f'drop_reasoning_head.monitor: found {self.monitor!r}, whose value is not one number; expected a metric of '
            f'{self._label} that is, such as an accuracy'
        )

    def _find_best(self, state: State) -> dict[str, Any] | None:
        """What a run that is resumed has kept; what an earlier run left is removed."""
        path = self._best_path(state)
        kept = read_kept(path) if path.exists() else None
        batch = int(state.timestamp.batch)
        if batch == 0:
            path.unlink(missing_ok=True)
            return None
        if kept and kept['run'] in self._runs and kept['best']['batch'] <= batch:
            best = kept['best']
            if (best['metric'], best['dataloader_label']) == (self.monitor, self._label):
                return best
        log.warning(
            'drop_reasoning_head.monitor: %s: %s; the best from here on is exported',
            path,
            'of another run, or of a later batch' if kept else 'not there',
        )
        return None

    def _name_run(self, state: State) -> None:
        """Give this process an id, which several of these share: Composer stores the state of one for them all."""
        run = on_rank_zero(lambda: uuid.uuid4().hex)
        longest = max((part._runs for part in state.callbacks if isinstance(part, DropReasoningHead)), key=len)
        self._runs = longest if len(longest) > len(self._runs) else [*self._runs, run]

    def state_dict(self) -> dict[str, Any]:
        """By which runs the best weights may have been kept."""
        return {'runs': self._runs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another run, of which this is the same up to here."""
        self._runs = list(state.get('runs', ()))

    def _best_path(self, state: State) -> Path:
        # A name that tells the time is that of the start.
        return best_path(format_name_with_dist_and_time(self.output_dir, state.run_name, Timestamp()))

    def _written_by_others(self, state: State, logger: Logger) -> dict[str, str]:
        """What the trainer's other parts write here, by name; other exporters by their number."""
        exporters = [part for part in state.callbacks if isinstance(part, DropReasoningHead)]
        found = _written_by_trainer(state, logger)
        for number, other in enumerate(exporters, 1):
            if other is not self:
                found[f'output_dir of DropReasoningHead {number}'] = self._named(other.output_dir, state)
            if other is not self and other.monitor:
                found[f'the best weights of DropReasoningHead {number}'] = str(other._best_path(state))
        return found

    def _held_out_of_now(self, state: State) -> HeldOut | None:
        return self._held_out if self.calibrate and self._evaluations.is_of_now(self.calibrate, state) else None

    def eval_start(self, state: State, logger: Logger) -> None:
        """Forget the logits and rows of the evaluation before."""
        del logger
        self._logits = []
        if state.dataloader_label == self._rows_of:
            self._rows = []

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """Note the labels; a ``HuggingFaceModel`` takes them out of the batch. Keep some rows for int8."""
        del logger
        if self.onnx == 'int8' and len(self._rows) < ROWS and self._rows_of in ('', state.dataloader_label):
            self._rows_of = str(state.dataloader_label)
            self._rows = (self._rows + rows_of(state.batch))[:ROWS]
        if self._is_calibrated_by(state):
            self._labels = state.batch['labels'].cpu()

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Note the logits."""
        del logger
        if self._is_calibrated_by(state):
            outputs: Any = state.outputs
            logits = outputs if isinstance(outputs, Tensor) else outputs['logits']
            self._logits.append((logits.detach().float().cpu(), self._labels))

    def _is_calibrated_by(self, state: State) -> bool:
        return self.calibrate is not None and state.dataloader_label == self.calibrate

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note of which weights metrics and logits are: Composer's last evaluation may come after the fit's end."""
        self._evaluations.eval_end(state, logger)
        if self._is_calibrated_by(state):
            self._held_out = _held_out(self._logits, getattr(state.dataloader, 'sampler', None))
            self._logits = []

    @staticmethod
    def _named(name: str, state: State) -> str:
        return format_name_with_dist_and_time(name, state.run_name, state.timestamp)

    def close(self, state: State, logger: Logger) -> None:
        """End the uploader's processes."""
        del state, logger
        for target in self._targets:
            target.close()


def _evaluates_yet(state: State) -> bool:
    """Whether Composer evaluates after the fit's end, as where its interval does not divide the fit.

    A user's own schedule is not asked: it may count how often it is, and Composer promises it two other events.
    """
    schedules = [evaluator.eval_interval for evaluator in state.evaluators]
    composers = create_interval_scheduler.__module__
    return any(due(state, Event.FIT_END) for due in schedules if due and getattr(due, '__module__', '') == composers)


def _held_out(parts: Sequence[HeldOut], sampler: Any) -> HeldOut | None:
    """Logits and labels of all ranks' rows that have a label, each row once; ``None`` where there are none."""
    mine = tuple(torch.cat(part) for part in zip(*parts)) if parts else ()
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:  # its last row may be another rank's first
        count = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # pyright: ignore
        mine = tuple(part[:count] for part in mine)
    found = [part for part in gather(mine) if part]
    if not found:
        return None
    logits, labels = (torch.cat(part) for part in zip(*found))
    known = is_known(labels, IGNORE_INDEX)
    return (logits[known], labels[known]) if known.any() else None


def _check_name(key: str, name: str, known: Iterable[str], what: str) -> None:
    if name not in known:
        raise UserError(f'drop_reasoning_head.{key}: found {name!r}; {_one_of(known, what)}')


def _one_of(names: Iterable[str], what: str) -> str:
    return f'expected the name of {"an" if what[0] in "aeiou" else "a"} {what}: {", ".join(names) or "there is none"}'


def _written_by_trainer(state: State, logger: Logger) -> dict[str, str]:
    """What the trainer's savers and loggers write here, by name."""
    found = {}
    for part in [*state.callbacks, *logger.destinations]:
        if isinstance(part, CheckpointSaver):
            found['save_folder'] = part.folder
        elif isinstance(part, FileLogger):
            found['the log'] = part.filename_format
        elif isinstance(part, TensorboardLogger) and part.log_dir:
            found["TensorBoard's log_dir"] = part.log_dir
    return {key: format_name_with_dist(name, state.run_name) for key, name in found.items()}
