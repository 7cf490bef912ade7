"""What Composer's loggers are told of a run, and what they need: MLflow, TensorBoard, Weights & Biases and the rest."""

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from composer.loggers import Logger, LoggerDestination, MLFlowLogger, TensorboardLogger
from composer.utils import dist
from omegaconf import DictConfig, OmegaConf

from dhrd_plugin import registry
from dhrd_plugin.config import part_settings, without_secrets
from dhrd_plugin.data.remote import one_line
from dhrd_plugin.errors import UserError
from dhrd_plugin.models import pyfunc
from dhrd_plugin.models.load import load_slim_config

MODEL = 'slim'  # the logged model's place among the run's artifacts


def build_loggers(config: DictConfig, goes_on: bool) -> list[LoggerDestination]:
    """The loggers of the config; made first of all, so that a server out of reach costs nothing else.

    Args:
        config: the run's.
        goes_on: whether it goes on from a checkpoint of its own: then in its own MLflow run, too.

    Raises:
        UserError: a package is missing, or a server refuses.
    """
    built = []
    for name, kwargs in part_settings(config, 'loggers').items():
        key = f'loggers.{name}'
        if name == 'mlflow' and goes_on:
            kwargs = {'resume': True, **kwargs}
        if isinstance(kwargs.get('tracking_uri'), str):
            kwargs = {**kwargs, 'tracking_uri': credentials_to_environment(kwargs['tracking_uri'])}
        try:
            logger = registry.build('loggers', name, kwargs, key)
        except UserError:
            raise
        except Exception as error:  # of the package's own many kinds
            raise UserError(f'{key}: {without_secrets(one_line(error))}') from error
        # TensorBoard's writes an empty file on every rank that it makes a writer on.
        if not (isinstance(logger, TensorboardLogger) and logger.rank_zero_only and dist.get_global_rank() != 0):
            built.append(logger)
    return built


def credentials_to_environment(address: str) -> str:
    """An MLflow address without ``user:password@``, which MLflow would print: it finds them in its own variables."""
    parts = urlsplit(address)
    if parts.scheme not in ('http', 'https') or parts.password is None:
        return address
    os.environ['MLFLOW_TRACKING_USERNAME'] = unquote(parts.username or '')
    os.environ['MLFLOW_TRACKING_PASSWORD'] = unquote(parts.password)
    return parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()


def flat(settings: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Nested settings by dotted name, as on the command line: ``{'model.lora.r': 16, ...}``; lists stay whole."""
    found = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f'{prefix}{name}.') if nested else {f'{prefix}{name}': value}
    return found


def without_secret_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of the command line as loggers may store them; W&B stores ``sys.argv``."""
    kept = []
    for argument in arguments:
        given = OmegaConf.to_container(OmegaConf.from_dotlist([argument])) if '=' in argument else {}
        kept.append(argument if without_secrets(given) == given else f'{argument.split("=")[0]}=***')
    return kept


def mlflow_logger(logger: Logger) -> MLFlowLogger | None:
    """The MLFlowLogger among the destinations of Composer's logger."""
    return next((found for found in logger.destinations if isinstance(found, MLFlowLogger)), None)


def mlflow_run(logger: Logger) -> str | None:
    """Where MLflow shows the run: the page of a server, else the store and the run's id. Rank 0 knows."""
    found = mlflow_logger(logger)
    if found is None:
        return None
    if found.tracking_uri.startswith('http'):
        return f'{found.tracking_uri.rstrip("/")}/#/experiments/{found._experiment_id}/runs/{found._run_id}'
    return f'run {found._run_id} in {without_secrets(found.tracking_uri)}'


@contextmanager
def ends_in_mlflow(logger: Logger) -> Iterator[None]:
    """A run that fails inside is FAILED in MLflow, one that is stopped KILLED; Composer calls both FINISHED."""
    try:
        yield
    except BaseException as error:
        if mlflow_logger(logger) is not None and dist.get_global_rank() == 0:
            import mlflow

            mlflow.flush_async_logging()
            mlflow.end_run('FAILED' if isinstance(error, Exception) else 'KILLED')
        raise


class MlflowTarget:
    """The slim classifier as a logged model of the run, which ``mlflow.pyfunc.load_model`` loads.

    It takes texts and gives labels and probabilities. It holds the folder, safetensors and code, no
    pickle, and needs torch and transformers, not this package.

    Args:
        logger: Composer's, of the run.
        registered_name: registers it as a new version under this name. Default: not.
    """

    def __init__(self, logger: MLFlowLogger, registered_name: str | None = None):
        self.logger = logger
        self.registered_name = registered_name

    def upload(self, folder: Path, name: Callable[[str], str]) -> None:
        """Log a folder of :func:`~dhrd_plugin.models.export.write_slim`.

        Raises:
            UserError: MLflow refuses.
        """
        del name
        import mlflow
        from mlflow.models import Model

        packages = ('mlflow', 'torch', 'transformers', 'safetensors')
        labels = list(load_slim_config(folder).id2label.values())  # pyright: ignore
        try:
            model = Model.log(
                MODEL,
                mlflow.pyfunc,
                run_id=self.logger._run_id,
                python_model=pyfunc.__file__,
                artifacts={pyfunc.ARTIFACT: str(folder)},
                signature=signature(labels),
                pip_requirements=[f'{package}=={importlib.metadata.version(package)}' for package in packages],
            )
            if self.registered_name is not None:
                self.logger.register_model_with_run_id(model.model_uri, self.registered_name)
        except Exception as error:  # MLflow's, and those of its stores
            what = without_secrets(one_line(error))
            raise UserError(f'drop_reasoning_head.mlflow: cannot be logged: {what}') from error


def signature(labels: Sequence[str]) -> Any:
    """MLflow's signature of a slim classifier: a text in; a label, and a probability for each label, out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Object, Property

    probabilities = Object([Property(label, 'double') for label in labels])
    return ModelSignature(
        inputs=Schema([ColSpec('string')]),
        outputs=Schema([ColSpec('string', 'label'), ColSpec(probabilities, 'probabilities')]),
    )
