"""The slim classifier as a logged model of an MLflow run."""

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhrd_plugin.errors import user_errors
from dhrd_plugin.export import pyfunc
from dhrd_plugin.models.build import load_slim_config
from dhrd_plugin.problem_type import is_multi_label

if TYPE_CHECKING:
    from composer.loggers import Logger, MLFlowLogger

MODEL = 'slim'  # the logged model's place among the run's artifacts


def mlflow_logger(logger: 'Logger') -> 'MLFlowLogger | None':
    """The MLFlowLogger among the destinations of Composer's logger; ``None`` where there is none."""
    from composer.loggers import MLFlowLogger

    return next((found for found in logger.destinations if isinstance(found, MLFlowLogger)), None)


class MlflowTarget:
    """The slim classifier as a logged model of the run, which ``mlflow.pyfunc.load_model`` loads.

    It maps texts to labels and probabilities. It holds the folder, safetensors and code, no pickle,
    and needs torch and transformers, not this package.

    Args:
        logger: Composer's MLflow logger of the run.
        registered_name: register it as a new version under this name. Default: not.
    """

    def __init__(self, logger: 'MLFlowLogger', registered_name: str | None = None):
        self.logger = logger
        self.registered_name = registered_name

    def upload(self, folder: Path, name: Callable[[str], str]) -> None:
        """Log a folder of :func:`~dhrd_plugin.export.write.write_slim`; the run names the model, so not ``name``."""
        import mlflow
        from mlflow.models import Model

        packages = ('mlflow', 'torch', 'transformers', 'safetensors')
        config = load_slim_config(folder)
        labels = list(config.id2label.values())  # pyright: ignore
        with user_errors('drop_reasoning_head.mlflow: cannot be logged', kind=True):  # MLflow's, and its stores'
            model = Model.log(
                MODEL,
                mlflow.pyfunc,
                run_id=self.logger._run_id,
                python_model=pyfunc.__file__,
                artifacts={pyfunc.ARTIFACT: str(folder)},
                signature=signature(labels, is_multi_label(config)),
                pip_requirements=[f'{package}=={importlib.metadata.version(package)}' for package in packages],
            )
            if self.registered_name is not None:
                self.logger.register_model_with_run_id(model.model_uri, self.registered_name)


def signature(labels: Sequence[str], multi_label: bool = False) -> Any:
    """MLflow's ``ModelSignature`` of a slim classifier: from a text to its label, or labels, and each probability."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    probabilities = Object([Property(label, 'double') for label in labels])
    label = ColSpec(Array('string') if multi_label else 'string', 'label')
    return ModelSignature(
        inputs=Schema([ColSpec('string')]), outputs=Schema([label, ColSpec(probabilities, 'probabilities')])
    )
