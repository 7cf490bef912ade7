"""Export the slim classifier at the end of the fit, and at intervals on request."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.algorithms import EMA
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.distributed.prepare_distributed import get_full_state_dict
from composer.loggers import FileLogger, Logger, TensorboardLogger
from composer.models import HuggingFaceModel
from composer.models.huggingface import maybe_get_underlying_model
from composer.utils import create_interval_scheduler, format_name_with_dist, format_name_with_dist_and_time
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from dhrd_plugin.errors import UserError
from dhrd_plugin.export.mlflow import MlflowTarget, mlflow_logger
from dhrd_plugin.export.onnx import check_onnx
from dhrd_plugin.export.place import check_place
from dhrd_plugin.export.targets import HubTarget, RemoteTarget
from dhrd_plugin.export.write import DTYPES, add_onnx, network_state, write_slim
from dhrd_plugin.models.build import is_sequence_classifier
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier, describe
from dhrd_plugin.ranks import on_rank_zero
from dhrd_plugin.streams.remote import check_address
from dhrd_plugin.times import parse_time


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
        onnx: add ``model.onnx`` besides, fp32, of dynamic batch and length; needs the extra ``onnx``. Where it
            cannot be made, or does not answer as the model does, the rest is published before the run ends.
            Default: ``False``.
        push_to_hub: a repository of the Hugging Face hub, such as ``org/name``; the token is
            huggingface_hub's (``HF_TOKEN`` or its login). Default: none.
        private: whether that repository is private, where it is created. Default: ``False``.
        mlflow: at the end of the fit, log it as a model of the MLflow run, with its signature
            (:class:`~dhrd_plugin.export.mlflow.MlflowTarget`). Default: where the trainer has Composer's MLFlowLogger.
        mlflow_registered_model_name: register that model under this name besides. Default: not.

    Raises:
        UserError: an unknown ``dtype``; a wrong interval; a missing package; and before training, a
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
        onnx: bool = False,
        push_to_hub: str | None = None,
        private: bool = False,
        mlflow: bool | None = None,
        mlflow_registered_model_name: str | None = None,
    ):
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f'drop_reasoning_head.dtype: found {dtype!r}; expected one of {list(DTYPES)}')
        if onnx:
            check_onnx('drop_reasoning_head.onnx')
        self.output_dir = str(output_dir)
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.onnx = onnx
        self._measured: dict[str, int] = {}  # the batch of each evaluation set's metrics
        self._due = None
        if every is not None:
            interval = parse_time(every, 'drop_reasoning_head.every')
            self._due = create_interval_scheduler(interval, include_end_of_training=False)
        self._targets = [RemoteTarget(remote)] if remote else []
        self._targets += [HubTarget(push_to_hub, private)] if push_to_hub else []
        self._mlflow = True if mlflow_registered_model_name else mlflow
        self._registered_name = mlflow_registered_model_name

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse before training what cannot be exported or uploaded."""
        check_exportable(getattr(state.model, 'module', state.model))
        if self._mlflow and mlflow_logger(logger) is None:
            raise UserError('drop_reasoning_head.mlflow: found without a logger of MLflow; expected loggers.mlflow')
        out, apart = self._named(self.output_dir, state), _written_by_others(state, logger)
        on_rank_zero(lambda: check_place(out, 'drop_reasoning_head.output_dir', apart))
        for target in self._targets:
            if isinstance(target, RemoteTarget):
                check_address(self._named(target.remote, state), 'drop_reasoning_head.remote')
        if self._targets:
            on_rank_zero(lambda: [target.check() for target in self._targets] and None)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Export where it is time to."""
        del logger
        self._export_if_due(Event.BATCH_CHECKPOINT, state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Export where it is time to."""
        del logger
        self._export_if_due(Event.EPOCH_CHECKPOINT, state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Export, to MLflow as well."""
        tracker = None if self._mlflow is False else mlflow_logger(logger)
        self._export(state, [] if tracker is None else [MlflowTarget(tracker, self._registered_name)])

    def _export_if_due(self, event: Event, state: State) -> None:
        if self._due and self._due(state, event):
            self._export(state)

    def _export(self, state: State, targets: Sequence[MlflowTarget] = ()) -> None:
        model: Any = getattr(state.model, 'module', state.model)
        metrics = {label: found for label, found in compute_metrics(state).items() if self._is_of_now(label, state)}
        out = Path(self._named(self.output_dir, state))
        live = None if _is_sharded(state) else model.model

        def work() -> None:
            ours = isinstance(model, ComposerDualHeadClassifier)
            metadata = model.get_metadata() if ours else describe(model)
            write_slim(metadata, weights, out, self.dtype, metrics, live=live)
            try:
                if self.onnx:
                    add_onnx(out)
            finally:  # the rest of it is whole
                for target in [*self._targets, *targets]:
                    target.upload(out, lambda name: self._named(name, state))

        with _averaged_weights(state):
            weights = _gather_network_state(state.model)
            on_rank_zero(work)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note of which weights the metrics are: Composer's last evaluation may come after the fit's end."""
        del logger
        self._measured[str(state.dataloader_label)] = int(state.timestamp.batch)

    def _is_of_now(self, label: str, state: State) -> bool:
        return self._measured.get(label) == int(state.timestamp.batch)

    @staticmethod
    def _named(name: str, state: State) -> str:
        return format_name_with_dist_and_time(name, state.run_name, state.timestamp)

    def close(self, state: State, logger: Logger) -> None:
        """End the uploader's processes."""
        del state, logger
        for target in self._targets:
            target.close()


def _written_by_others(state: State, logger: Logger) -> dict[str, str]:
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


def compute_metrics(state: State) -> dict[str, dict[str, float]]:
    """Compute the evaluators' metrics as they stand. Every rank has to call it.

    Returns:
        Values by evaluator's label and metric's name; empty before the first evaluation.
    """
    return {
        label: {name: float(metric.compute()) for name, metric in metrics.items()}
        for label, metrics in state.eval_metrics.items()
        if all(metric.update_called for metric in metrics.values())
    }
