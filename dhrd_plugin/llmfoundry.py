"""What llm-foundry finds by its entry points, so that its own trainer trains DHRD from a YAML.

``yamls/llmfoundry/rte.yaml`` names every part. llm-foundry's registries take classes, hold them against
the kind of part that they expect, and call them; so each class here, when called, makes the part that the
package has, with the keys and the checks of our own YAML. llm-foundry is not imported.
"""

from typing import Any

from composer import DataSpec
from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from dhrd_plugin.algorithms import auxiliary_reasoning_loss
from dhrd_plugin.data.tasks import load_task, named_labels
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.build import build_tokenizer
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.training.builders import build_evaluator, build_model, build_train_loader, find_streams
from dhrd_plugin.training.checks import check_loader
from dhrd_plugin.training.config import loaders, partial_config
from dhrd_plugin.training.registry import build_parts

ALGORITHM = 'auxiliary_reasoning_loss'
WHERE = 'llm-foundry'


class AuxiliaryReasoningLoss(auxiliary_reasoning_loss.AuxiliaryReasoningLoss):
    """``algorithms.auxiliary_reasoning_loss``: :class:`dhrd_plugin.AuxiliaryReasoningLoss`.

    Args:
        **settings: its arguments; ``schedule`` is a mapping, ``{name: linear, alpha_f: 0.0, ...}``, of any
            Composer scheduler.

    Raises:
        UserError: an argument that is unknown, of a wrong type or out of range.
    """

    def __new__(cls, **settings: Any) -> Any:
        """Make the package's own algorithm."""
        config = partial_config(WHERE, algorithms={ALGORITHM: settings})
        (algorithm,) = build_parts('algorithms', config.algorithms or {})
        return algorithm


class DualHeadClassifier(ComposerDualHeadClassifier):
    """``model.name: dual_head_classifier``: :class:`dhrd_plugin.ComposerDualHeadClassifier`.

    Args:
        tokenizer: llm-foundry's.
        task: a task's name, the path of a template, or the template itself; its labels are the classes.
        max_seq_len: as that of the data; stored in checkpoints and exports. Default: 512.
        markers: as those of the data; stored in checkpoints and exports. Default: ``<REASON>``, ``<ANS>``.
        init_device: ``'cpu'``, the only one.
        **model: keys of ``model`` in our own YAML (yamls/rte.yaml).

    Raises:
        UserError: an argument that is unknown, of a wrong type or out of range.
    """

    def __new__(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        task: Any,
        max_seq_len: int = 512,
        markers: dict[str, Any] | None = None,
        init_device: str = 'cpu',
        **model: Any,
    ) -> Any:
        """Make the package's own model."""
        if init_device != 'cpu':
            raise UserError(f"{WHERE}: model.init_device: found {init_device!r}; expected 'cpu' (or leave it out)")
        if 'reasoning_targets' in model:
            raise UserError(f'{WHERE}: model.reasoning_targets: belongs to the data; expected it in train_loader')
        config = partial_config(WHERE, task=task, max_seq_len=max_seq_len, markers=markers or {}, model=model)
        return build_model(config, named_labels(load_task(task)), tokenizer)


class TripletTokenizer(PreTrainedTokenizerBase):
    """``tokenizer.name: triplet_tokenizer``: a tokenizer with a pad token, also of a packaged model.

    Args:
        name: a hub id, a folder, or ``package:NAME``.
        **kwargs: for ``AutoTokenizer.from_pretrained``.

    Raises:
        UserError: it cannot be loaded.
    """

    def __new__(cls, name: str, **kwargs: Any) -> Any:
        """Load the tokenizer, of the class that its checkpoint names."""
        return build_tokenizer(name, **kwargs)


def triplets(
    tokenizer: PreTrainedTokenizerBase,
    device_batch_size: int,
    task: Any,
    max_seq_len: int = 512,
    markers: dict[str, Any] | None = None,
    reasoning_targets: str = 'sequence',
    evaluation: bool = False,
    seed: int = 17,
    **loader: Any,
) -> DataSpec:
    """``train_loader.name: triplets`` and ``eval_loader.name: triplets``.

    Args:
        tokenizer: llm-foundry's; grows by the markers where they are tokens.
        device_batch_size: rows of one rank, a whole number.
        task: a task's name, the path of a template, or the template itself.
        max_seq_len: in tokens; the rationale is cut to fit, the input never. Default: 512.
        markers: ``reason``, ``answer``, ``as_tokens``. Default: ``<REASON>`` and ``<ANS>`` as text.
        reasoning_targets: ``'sequence'`` (the paper) or ``'rationale'``.
        evaluation: read each row once, on any number of ranks, and no rationale; else rows are
            streamed. Default: ``False``.
        seed: of the order of the rows, and of which of a row's rationales is read. Default: 17.
        **loader: keys of ``train_loader`` in our own YAML: ``source`` or ``local``, ``remote``,
            ``streams``, and so on.

    Returns:
        The loader. It counts its samples as loss-generating tokens, so llm-foundry's
        ``accumulate_train_batch_on_tokens`` changes no gradient.

    Raises:
        UserError: an argument that is unknown, of a wrong type or out of range, or rows that are not there.
    """
    if not isinstance(device_batch_size, int):
        raise UserError(f'{WHERE}: found a device batch of {device_batch_size} rows; expected a whole number')
    config = partial_config(
        WHERE,
        seed=seed,
        task=task,
        max_seq_len=max_seq_len,
        markers=markers or {},
        model={'reasoning_targets': reasoning_targets},
        algorithms={ALGORITHM: {}},
        global_train_batch_size=device_batch_size * dist.get_world_size(),
        device_eval_batch_size=device_batch_size,
        **({'eval_loaders': {'eval': loader}} if evaluation else {'train_loader': loader}),
    )
    config.markers.add_to(tokenizer)
    key = 'eval_loaders.eval' if evaluation else 'train_loader'
    settings = loaders(config)[key]
    check_loader(key, settings)
    built = named_labels(load_task(task))
    streams = find_streams(key, settings, built)
    if evaluation:
        return build_evaluator(config, built, tokenizer, 'eval', streams).dataloader
    return build_train_loader(config, built, tokenizer, streams)
