"""Whether a checkpoint is of the configuration of the run that is to load it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from dhrd_plugin.checkpoints.read import Description, about, describe_checkpoint, plain_name
from dhrd_plugin.errors import UserError, one_line, user_errors
from dhrd_plugin.ranks import on_rank_zero
from dhrd_plugin.streams.settings import WEIGHTS

# Of a model's config: where it came from, and what it is called with. It is the same model with or without them.
_NOT_THE_MODELS = {
    '_attn_implementation_autoset',
    '_name_or_path',
    'architectures',
    'auto_map',
    'dtype',
    'id2label',
    'label2id',
    'torch_dtype',
    'transformers_version',
    'use_cache',
}
_NOT_THE_TOKENIZERS = ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
_SETTINGS = ('label_names', 'multi_label', 'head', 'norm', 'pooling', 'lora', 'markers')
# Of the YAML: what makes a run another one, be its weights of the same shapes. Schedules, the optimizer's arguments,
# intervals, places and all that is only about speed may change on the way.
_OF_THE_RUN = (
    'seed',
    'max_seq_len',
    'global_train_batch_size',
    'model.label_smoothing',
    'model.class_weights',
    'model.soft_label_weight',
    'model.reasoning_targets',
    'train_loader.layout',
    'train_loader.weights',
    'train_loader.rationale_max_tokens',
    'train_loader.control',
    'train_loader.shuffle',
    'train_loader.shuffle_seed',
)
# Of `train_loader.dataset`: what decides which rows come when. The rest is about downloads.
_ORDER = (
    'epoch_size',
    'shuffle_algo',
    'shuffle_block_size',
    'batching_method',
    'sampling_method',
    'sampling_granularity',
    'partition_algo',
    'replication',
)
_REASONING = 'auxiliary_reasoning_loss'
_REMEDY = 'gradient_clipping'  # may be added to a run whose loss was not finite


def check_configuration(checkpoint: str, key: str, model: Any, optimizer: str, weights_only: bool = False) -> None:
    """Refuse a checkpoint of another configuration. Every rank has to call it; rank 0 reads.

    Label names, heads, adapters, markers, the backbone's config, the vocabulary and the shape of every weight
    have to be those of the run; where it goes on from the checkpoint, so do the training rows and their mixture, the
    seed, the losses, the algorithms, the batch size, the optimizer's class, the weights that it trains and the rates of
    dropout.

    Args:
        checkpoint: as for :func:`~dhrd_plugin.checkpoints.read.read_checkpoint`; it has to be whole.
        key: of the config that names it, for messages.
        model: the :class:`~dhrd_plugin.ComposerDualHeadClassifier` that it is loaded into, not wrapped yet.
        optimizer: the name of the optimizer's class.
        weights_only: nothing but weights is loaded. Default: ``False``.

    Raises:
        UserError: it differs; one line names both values.
    """

    def check() -> None:
        with about(key):
            found = describe_checkpoint(checkpoint)
            flaw = next(differences(found, describe_run(model, optimizer), weights_only), None)
            if flaw is not None:
                raise UserError(f'{checkpoint}: {flaw}')

    on_rank_zero(check)


def describe_run(model: Any, optimizer: str) -> Description:
    """What a run is of; see :func:`check_configuration`."""
    return Description(
        metadata=model.get_metadata(),
        shapes={plain_name(name): tuple(value.shape) for name, value in model.state_dict().items()},
        optimizer=optimizer,
        trained=_count_trained(model),
    )


def _count_trained(model: nn.Module) -> int:
    return sum(parameter.requires_grad for parameter in model.parameters())


def differences(found: Description, run: Description, weights_only: bool = False) -> Iterator[str]:
    """In what a checkpoint differs from a run, a line each."""
    yield from _compare(_configuration(found, weights_only), _configuration(run, weights_only))
    missing, foreign = sorted(run.shapes.keys() - found.shapes.keys()), sorted(found.shapes.keys() - run.shapes.keys())
    if missing:
        yield f'weights: found none for {len(missing)} of {len(run.shapes)}, such as {missing[0]}; this run has them'
    if foreign:
        yield f'weights: found {foreign[0]}, which this run does not have'
    for name, shape in run.shapes.items():
        if name in found.shapes and found.shapes[name] != shape:
            yield f'weights: {name}: found {list(found.shapes[name])}; this run has {list(shape)}'


def _configuration(description: Description, weights_only: bool) -> dict[str, Any]:
    """What has to be the same, as plain data."""
    metadata = description.metadata
    settings = metadata.get('dhrd', {})
    content = metadata['model']['config']['content']
    fields = {name: settings[name] for name in _SETTINGS if name in settings}
    fields['model'] = {
        name: value
        for name, value in content.items()
        if name not in _NOT_THE_MODELS and not (weights_only and _is_a_rate(name))
    }
    fields['tokenizer'] = _vocabularies(metadata.get('tokenizer') or {})
    if not weights_only:
        if 'dropout' in settings:
            fields['model.classifier_dropout'] = settings['dropout']
        fields |= _of_the_run(settings.get('config'))
        if 'train_loader' in settings.get('data', {}):
            fields['train_loader (SHA-256 of its rows)'] = settings['data']['train_loader']
        known = {'optimizer': description.optimizer, 'trained weights': description.trained}
        fields |= {name: value for name, value in known.items() if value is not None}
    return json.loads(json.dumps(fields, default=str))


def _of_the_run(text: str | None) -> dict[str, Any]:
    """Of a run's YAML, what has to be the same where another goes on from it; by key."""
    with user_errors('config'):
        config: Any = OmegaConf.to_container(OmegaConf.create(text or ''))  # as it stands there, nothing resolved
        found = {key: value for key in _OF_THE_RUN for value in _values(config, *key.split('.'))}
        for streams in _values(config, 'train_loader', 'streams'):
            weights = {name: {key: stream.get(key) for key in WEIGHTS} for name, stream in streams.items()}
            found['train_loader.streams'] = weights
        for dataset in _values(config, 'train_loader', 'dataset'):
            found['train_loader.dataset'] = {key: dataset.get(key) for key in _ORDER}
        for algorithms in _values(config, 'algorithms'):
            used = {name: kwargs for name, kwargs in (algorithms or {}).items() if kwargs is not None}
            found['algorithms'] = sorted(used.keys() - {_REMEDY})
            if _REASONING in used:
                found[f'algorithms.{_REASONING}'] = {key: used[_REASONING].get(key, 1.0) for key in ('alpha', 'beta')}
        return found


def _values(config: Any, *keys: str) -> list[Any]:
    """The value under a key, if there is one: an older version's config has fewer."""
    for key in keys:
        if key not in config:
            return []
        config = config[key]
    return [config]


def _is_a_rate(name: str) -> bool:
    return 'drop' in name or name == 'initializer_range'


def _vocabularies(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A hash of each of a tokenizer's files that says which text becomes which tokens."""
    found = {}
    for name, file in files.items():
        if name not in _NOT_THE_TOKENIZERS and not name.endswith('.py'):
            content = file['content']
            if isinstance(content, Mapping):  # fast tokenizers note how they were last called
                content = {key: value for key, value in content.items() if key not in ('padding', 'truncation')}
            text = json.dumps(_without_empty(content), sort_keys=True, default=repr)
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return found


def _without_empty(value: Any) -> Any:
    """Plain data as shards hold it: torch leaves out what is empty."""
    if isinstance(value, Mapping):
        kept = {str(key): _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in ({}, [], None)}
    return [_without_empty(item) for item in value] if isinstance(value, (list, tuple)) else value


def _compare(found: Mapping[str, Any], run: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
    """Where two mappings differ; what only one of them names is of another version, or not known."""
    for key in (key for key in run if key in found):
        one, other = found[key], run[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _compare(one, other, f'{prefix}{key}.')
        elif one != other:
            yield f'{prefix}{key}: found {one_line(one, 120)}; this run has {one_line(other, 120)}'
