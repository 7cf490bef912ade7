"""Exports the slim classifier: at the fit's end, and at intervals where asked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.algorithms import EMA
from composer.core import Callback, Event, State
from composer.distributed.prepare_distributed import get_full_state_dict
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, format_name_with_dist_and_time
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dhrd_plugin import registry
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.export import DTYPES, check_exportable, network_state, write_slim
from dhrd_plugin.models.onnx import check_onnx
from dhrd_plugin.ranks import on_rank_zero
from dhrd_plugin.tracking import MlflowTarget, mlflow_logger
from dhrd_plugin.upload import HubTarget, RemoteTarget


def gather_network_state(model: nn.Module) -> dict[str, Tensor]:
    """The network's whole state on the CPU of rank 0; empty elsewhere. Every rank must call it.

    Works for one process, DDP and FSDP alike. In one process the tensors are the live ones.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # Of a model with adapters HuggingFaceModel would give the adapters alone.
    with get_full_state_dict(getattr(model, 'module', model)):
        return network_state(get_model_state_dict(model, options=options))


@contextmanager
def averaged_weights(state: State) -> Iterator[None]:
    """Inside, the model has the weights that evaluation measures: the averages of Composer's EMA where it runs."""
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


class DropReasoningHead(Callback):
    """Writes the slim classifier at the fit's end: backbone, classification head, tokenizer, model card.

    The live model is left as it is: it can go on training, be evaluated and be saved. Beside Composer's
    EMA the averaged weights are written, those that it evaluates. The folder holds safetensors and
    appears whole or not at all. Rank 0 writes; where it fails, every rank ends with its error.

    Args:
        output_dir: the folder to write. Placeholders as in Composer's ``save_folder`` and
            ``save_filename``: ``{run_name}``, ``{epoch}``, ``{batch}`` ...
        dtype: ``'fp32'``, ``'bf16'`` or ``'fp16'``. Default: as trained.
        every: a Composer time string such as ``'1ep'`` or ``'500ba'``; exports at this interval
            besides, each in the place of the last unless ``output_dir`` names the time. Default: never.
        remote: where to upload the folder, such as ``s3://bucket/rte/slim``, by Composer's
            ``RemoteUploader``; the same placeholders. Default: nowhere.
        onnx: write ``model.onnx`` besides, fp32, of dynamic batch and length; needs the extra ``onnx``.
        push_to_hub: a repository of the Hugging Face hub, such as ``org/name``; the token is
            huggingface_hub's (``HF_TOKEN`` or its login). Default: none.
        private: whether that repository is private, where it is created.
        mlflow: at the fit's end, log it as a model of the MLflow run, with its signature
            (:class:`~dhrd_plugin.tracking.MlflowTarget`). Default: where the trainer has Composer's MLFlowLogger.
        mlflow_registered_model_name: register that model under this name besides. Default: not.

    Raises:
        UserError: an unknown ``dtype``; a wrong interval; a missing package; and before training, a
            model that cannot be exported, a remote or a hub that refuses, ``mlflow`` without MLFlowLogger.
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
        self._due = None
        if every is not None:
            interval = registry.parse_time(every, 'drop_reasoning_head.every')
            self._due = create_interval_scheduler(interval, include_end_of_training=False)
        self._targets = [RemoteTarget(remote)] if remote else []
        self._targets += [HubTarget(push_to_hub, private)] if push_to_hub else []
        self._mlflow = True if mlflow_registered_model_name else mlflow
        self._registered_name = mlflow_registered_model_name

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse what cannot be exported or uploaded, before it is trained."""
        check_exportable(getattr(state.model, 'module', state.model))
        if self._mlflow and mlflow_logger(logger) is None:
            raise UserError('drop_reasoning_head.mlflow: found without a logger of MLflow; expected loggers.mlflow')
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
        metrics = compute_metrics(state)
        out = Path(self._named(self.output_dir, state))

        def work() -> None:
            write_slim(model.get_metadata(), weights, out, self.dtype, metrics, self.onnx)
            for target in [*self._targets, *targets]:
                target.upload(out, lambda name: self._named(name, state))

        with averaged_weights(state):
            weights = gather_network_state(state.model)
            on_rank_zero(work)

    @staticmethod
    def _named(name: str, state: State) -> str:
        return format_name_with_dist_and_time(name, state.run_name, state.timestamp)

    def close(self, state: State, logger: Logger) -> None:
        """Let the uploader's processes go."""
        del state, logger
        for target in self._targets:
            target.close()


def compute_metrics(state: State) -> dict[str, dict[str, float]]:
    """The evaluators' metrics as they stand, by label; empty before the first evaluation. Every rank must call it."""
    return {
        label: {name: float(metric.compute()) for name, metric in metrics.items()}
        for label, metrics in state.eval_metrics.items()
        if all(metric.update_called for metric in metrics.values())
    }
