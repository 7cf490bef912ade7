"""Composer's MLFlowLogger, which loses nothing in silence."""

import logging
import posixpath
import re
from collections.abc import Iterable
from typing import Any

import composer.loggers
from composer.core import State
from composer.loggers import Logger

from dhrd_plugin.errors import UserError, one_line

LONGEST_NAME = 250


def fit_name(name: str) -> str:
    """A name as MLflow takes it: what is no letter, digit, or one of ``_-./:`` and space becomes ``_``."""
    fit = re.sub(r'[^\w./: -]', '_', name)[:LONGEST_NAME]
    path = posixpath.normpath(fit)
    # Of a name that would be another file's MLflow takes none of the slashes and dots.
    return fit if path == fit and not path.startswith(('/', '.')) else re.sub(r'[./]', '_', fit)


class MLFlowLogger(composer.loggers.MLFlowLogger):
    """Composer's, but that MLflow takes every name, and that it keeps what MLflow says it lost.

    MLflow takes names and values in batches, in a thread of its own. Where it does not like one of them it leaves out
    the whole batch and writes to its log; the run ends as FINISHED.
    """

    def init(self, state: State, logger: Logger) -> None:
        """Listen to MLflow's thread from here on."""
        self._losses = _Errors()
        super().init(state, logger)

    def rename(self, key: str) -> str:
        """The name of a metric in MLflow."""
        return fit_name(super().rename(key))

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log parameters, but in a run that goes on those that it has: MLflow changes none, and leaves out all."""
        if not self._enabled:
            return
        known = self._mlflow_client.get_run(self._run_id).data.params if self.resume and self._run_id else {}
        names = _fit_names(hyperparameters)
        super().log_hyperparameters({names[k]: value for k, value in hyperparameters.items() if names[k] not in known})

    def flush(self) -> str | None:
        """Wait until MLflow has taken everything so far; returns what it could not take, on one line, if anything."""
        import mlflow

        mlflow.flush_async_logging()
        return self._losses.first


def _fit_names(names: Iterable[str]) -> dict[str, str]:
    fit: dict[str, str] = {}
    for name in names:
        fit[name] = fit_name(name)
        other = next(other for other in fit if fit[other] == fit[name])
        if other != name:
            raise UserError(
                f'loggers.mlflow: {other} and {name} would be one name in MLflow, {fit[name]!r}; expected names that '
                'differ in letters, digits, or one of "_-./: "'
            )
    return fit


class _Errors(logging.Handler):
    """Keeps the first error of MLflow's thread, which tells its log alone."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first: str | None = None
        logging.getLogger('mlflow.utils.async_logging').addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.first = self.first or one_line(record.getMessage())
