"""What Composer's loggers are told of a run, and what they need: MLflow, TensorBoard, Weights & Biases and the rest."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from composer.loggers import Logger, LoggerDestination, TensorboardLogger
from composer.utils import dist
from omegaconf import OmegaConf

from dhrd_plugin.errors import UserError, tell, user_errors
from dhrd_plugin.export.mlflow import mlflow_logger
from dhrd_plugin.ranks import on_rank_zero
from dhrd_plugin.redact import MASK, without_secrets
from dhrd_plugin.training import registry
from dhrd_plugin.training.config import Config, used
from dhrd_plugin.training.mlflow_logger import MLFlowLogger


def build_loggers(config: Config, goes_on: bool) -> list[LoggerDestination]:
    """The loggers of the config; made first of all, so that a server out of reach costs nothing else.

    A run that ``goes_on`` from a checkpoint of its own goes on in its own MLflow run, too.
    """
    built = []
    for name, kwargs in used(config.loggers).items():
        key = f'loggers.{name}'
        if name == 'mlflow':
            kwargs = {'resume': True, **kwargs} if goes_on else kwargs
            if address := os.environ.get('MLFLOW_TRACKING_URI'):
                os.environ['MLFLOW_TRACKING_URI'] = credentials_to_environment(address)
        if isinstance(kwargs.get('tracking_uri'), str):
            kwargs = {**kwargs, 'tracking_uri': credentials_to_environment(kwargs['tracking_uri'])}
        with user_errors(key, kind=True):  # of many kinds, each package's own
            logger = registry.build('loggers', name, kwargs, key)
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


def mlflow_run(logger: Logger) -> str | None:
    """Where MLflow shows the run: the page of a server, else the store and the run's id. Rank 0 knows."""
    found = mlflow_logger(logger)
    if found is None:
        return None
    address = without_secrets(found.tracking_uri)
    if address.startswith('http'):
        return f'{address.rstrip("/")}/#/experiments/{found._experiment_id}/runs/{found._run_id}'
    return f'run {found._run_id} in {address}'


@contextmanager
def ends_in_mlflow(logger: Logger) -> Iterator[None]:
    """A run that fails inside is FAILED in MLflow, one that is stopped KILLED; Composer calls both FINISHED.

    One of which MLflow did not take everything is FAILED as well, and a line says so.
    """
    try:
        yield
        _tell_lost(mlflow_logger(logger))
    except BaseException as error:
        if mlflow_logger(logger) is not None and dist.get_global_rank() == 0:
            import mlflow

            mlflow.flush_async_logging()
            mlflow.end_run('FAILED' if isinstance(error, Exception) else 'KILLED')
        raise


def check_taken(logger: Logger) -> None:
    """Refuse a run of which MLflow, if it tracks the run, does not take the parameters. Every rank has to call it."""
    found = mlflow_logger(logger)

    def check() -> None:
        if lost := found.flush() if isinstance(found, MLFlowLogger) else None:
            raise UserError(f'loggers.mlflow: MLflow does not take the parameters: {lost}')

    if found is not None:
        on_rank_zero(check)


def _tell_lost(logger: LoggerDestination | None) -> None:
    if not isinstance(logger, MLFlowLogger) or dist.get_global_rank() != 0:
        return
    import mlflow

    if lost := logger.flush():
        tell(f'warning: loggers.mlflow: the run lacks what MLflow did not take: {lost}')
        mlflow.end_run('FAILED')


def without_secret_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of the command line as loggers may store them; W&B stores ``sys.argv``."""
    kept = []
    for argument in arguments:
        try:
            given = OmegaConf.to_container(OmegaConf.from_dotlist([argument])) if '=' in argument else {}
            secret = without_secrets(given) != given
        except Exception:  # of PyYAML and of OmegaConf: it is no YAML, and refused where it is read
            secret = True
        kept.append(f'{argument.split("=")[0]}={MASK}' if secret else argument)
    return kept
