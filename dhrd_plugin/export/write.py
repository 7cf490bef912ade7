"""Write the slim classifier: backbone and classification head, no LM head, no adapters, no pickle."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification, PretrainedConfig

from dhrd_plugin.errors import UserError, one_line, user_errors
from dhrd_plugin.export.card import model_card, with_int8
from dhrd_plugin.export.int8 import NAME as INT8
from dhrd_plugin.export.int8 import Row, compare, rows_of, write_int8
from dhrd_plugin.export.onnx import NAME, OnnxClassifier, check_answers, check_onnx, made_rows, write_onnx
from dhrd_plugin.export.place import check_place, foreign
from dhrd_plugin.export.probe import Inputs, ask, ends_in_pad, find_difference, probe_rows
from dhrd_plugin.export.tokenizer import restored_tokenizer
from dhrd_plugin.files import replace_folder, staged
from dhrd_plugin.losses import IGNORE_INDEX
from dhrd_plugin.models import heads, slim
from dhrd_plugin.models.build import load_slim, merged_state, rebuild, without_weights
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.versions import DTYPE, config_from, is_taken_for_another, save_tokenizer, tokenizer_class
from dhrd_plugin.problem_type import MULTI_LABEL, SINGLE_LABEL, is_multi_label

_NETWORK = 'model.'  # its name inside a HuggingFaceModel
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def write_slim(
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    out: str | Path,
    dtype: torch.dtype | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    onnx: bool | str | None = None,
    live: nn.Module | None = None,
    best: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> Path:
    """Write a slim classifier from a model's full state.

    A ``linear`` head over the ``last`` token becomes the backbone's plain Hugging Face
    ``...ForSequenceClassification``, where the tokenizer never ends an input in its pad token: the stock class
    pools the last token that is not that one, whatever the mask says. Any other becomes a
    :class:`~dhrd_plugin.models.slim.SlimClassifier` whose code travels in the folder and loads with
    ``trust_remote_code=True``. Neither needs this package.

    A model that :func:`~dhrd_plugin.apply_reasoning_head` was applied to becomes the stock classifier
    that it was, adapters merged.

    The folder is loaded and asked a few rows before it appears: one that does not answer as the model does is not
    published.

    Args:
        metadata: of :meth:`~dhrd_plugin.ComposerDualHeadClassifier.get_metadata`, or of a ``HuggingFaceModel``.
        state: the whole state dict of the model inside, on the CPU, names as in that model.
        out: the folder; appears whole or not at all, and at the end replaces an earlier export that stood there.
        dtype: of the weights. Default: as they are.
        metrics: for the model card, by evaluation set and name. Default: none are known.
        onnx: ``True`` or ``'fp32'`` adds ``model.onnx`` when the folder is published, and ``'int8'`` also
            ``model-int8.onnx`` (:func:`add_onnx`). Default: none.
        live: the model inside itself, which is asked the same rows. Default: one rebuilt from metadata and state.
        best: of which evaluation the weights are, for card and config: ``metric``, ``dataloader_label``, ``value``,
            ``batch``, ``epoch``. Default: they are the last.
        calibration: of :func:`~dhrd_plugin.calibration.calibrate`, for card and config; the last layer is divided by
            its ``temperature``. Default: as trained.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` is taken by something else, or cannot be written; weights that are not finite; an export
            that differs from the model; a tokenizer's file in the metadata that is none; an ONNX file that cannot be
            made.
    """
    onnx = check_onnx('onnx', onnx)
    check_place(out)
    out = Path(out)
    model = _rebuild(metadata, state)
    pad, longest = _pad_token_id(metadata), metadata.get('dhrd', {}).get('max_seq_len')
    with restored_tokenizer(metadata.get('tokenizer'), pad, longest) as tokenizer, staged(out) as folder:
        pad_last = ends_in_pad(tokenizer, pad)
        lm: Any = getattr(model, 'causal_lm', model)
        inputs = probe_rows(tokenizer, len(lm.get_input_embeddings().weight), pad, pad_last)
        asked, expected = _ask(live, model, inputs)
        temperature = calibration['temperature'] if calibration else 1.0
        chosen = {'best': best, 'calibration': calibration}
        flaw, several = None, _is_multi_label(metadata, model)
        stock = not pad_last and not is_taken_for_another(tokenizer, lm.config)
        for config, weights in _forms(model, metadata, stock):
            _empty(folder)
            _tell_facts(config, chosen)
            weights = _divide_last_layer(weights, len(expected[0]), temperature)
            _write_model(config, _cast(config, weights, dtype), tokenizer, folder)
            flaw = find_difference(folder, list(weights), asked, inputs, expected / temperature, tokenizer, several)
            if flaw is None:
                break
        else:
            raise UserError(f'{out}: not written, as it would not answer as the model does: {flaw}')
        card = model_card(metadata, metrics, isinstance(config, slim.SlimClassifierConfig), best, calibration)
        (folder / 'README.md').write_text(card, encoding='utf-8')
        replace_folder(folder, out, foreign)
    if onnx:
        add_onnx(out, onnx)
    return out


def _rebuild(metadata: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The model that metadata and state describe; its weights share the state's memory."""
    model = _described(metadata)
    state = {name: state[name] for name in _exported(metadata, state)}
    check_finite(state)
    with user_errors('the weights do not fit the description of the model', RuntimeError):
        model.load_state_dict(dict(state), assign=True)
    return model


def check_described(metadata: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a model whose weights are not those that its description builds, before a training that would be lost.

    Args:
        metadata: as for :func:`write_slim`.
        names: of the state dict of the model inside.

    Raises:
        UserError: code of its own; a weight too many, such as an adapter's that was added to the model, or too few.
    """
    with user_errors('drop_reasoning_head: the model cannot be built from its config', kind=True):
        expected = _described(metadata).state_dict().keys()
    odd = sorted(expected ^ set(_exported(metadata, names)))
    if odd:
        raise UserError(
            f'drop_reasoning_head: found a model with other weights than its description builds ({odd[0]}), as where '
            'an adapter was added to it; expected one that its config, or a peft_config, tells whole'
        )


def _described(metadata: Mapping[str, Any]) -> nn.Module:
    """The model that metadata describe, without weights."""
    return rebuild(metadata) if 'dhrd' in metadata else _rebuild_stock(metadata)


def _exported(metadata: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names without those of the reasoning head that a stock classifier was given."""
    return [name for name in names if 'dhrd' in metadata or 'lm_head' not in name.split('.')]


def _ask(live: nn.Module | None, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Tensor]:
    """The live model and its logits; those of the rebuilt one where there is none, or it cannot be asked alone."""
    if live is not None:
        with suppress(Exception):  # attention of 16 bits refuses the fp32 weights of mixed precision
            return live, ask(live, inputs)
    with user_errors('the model cannot be run on the CPU, to compare its export with it', kind=True):
        return model, ask(model, inputs)


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite: nothing can be classified with them."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f'{name}: found weights that are not finite; expected those of a training that converged')


def _pad_token_id(metadata: Mapping[str, Any]) -> int | None:
    return metadata.get('dhrd', metadata['model']['config']['content']).get('pad_token_id')


def _is_multi_label(metadata: Mapping[str, Any], model: nn.Module) -> bool:
    return bool(metadata['dhrd'].get('multi_label')) if 'dhrd' in metadata else is_multi_label(model.config)


def _forms(
    model: nn.Module, metadata: Mapping[str, Any], stock: bool
) -> Iterator[tuple[PretrainedConfig, dict[str, Tensor]]]:
    """Config and weights of each class that the model may be written as, the one to prefer first."""
    if not isinstance(model, DualHeadNetwork):
        config = model.config
        config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]  # pyright: ignore
        yield config, _merged_stock_state(model)  # pyright: ignore
        return
    common = _common(metadata['dhrd'])
    weights, head = merged_state(model), model.classifier.state_dict()
    backbone = model.config
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(backbone), None)
    if stock and kind is not None and model.classifier.kind == 'linear' and model.pooling == 'last':
        architecture = kind.__name__  # pyright: ignore
        config = type(backbone)(**{**backbone.to_dict(), **common, 'architectures': [architecture]})
        prefix = model.causal_lm.base_model_prefix
        yield config, {f'{prefix}.{k}': v for k, v in weights.items()} | {'score.weight': head['out_proj.weight']}
    config = slim.SlimClassifierConfig(
        backbone=backbone,
        head=model.classifier.kind,
        pooling=model.pooling,
        classifier_dropout=model.classifier.dropout.p,
        classifier_norm=model.classifier.norm is not None,
        hidden_size=model.lm_head.weight.shape[1],
        architectures=['SlimClassifier'],
        auto_map={
            'AutoConfig': 'slim.SlimClassifierConfig',
            'AutoModelForSequenceClassification': 'slim.SlimClassifier',
        },
        **{DTYPE: getattr(backbone, DTYPE)},
        **common,
    )
    yield config, {f'backbone.{k}': v for k, v in weights.items()} | {f'classifier.{k}': v for k, v in head.items()}


def _common(settings: Mapping[str, Any]) -> dict[str, Any]:
    labels = settings['label_names']
    return {
        'id2label': dict(enumerate(labels)),
        'label2id': {name: index for index, name in enumerate(labels)},
        'pad_token_id': settings['pad_token_id'],
        # Always, as the backbone may be of an earlier classifier, whose config tells its own.
        'problem_type': MULTI_LABEL if settings.get('multi_label') else SINGLE_LABEL,
        'dhrd': {key: settings.get(key) for key in ('task', 'markers', 'max_seq_len')},
    }


def _rebuild_stock(metadata: Mapping[str, Any]) -> nn.Module:
    """A Hugging Face classifier, with its adapters, without weights."""
    config = config_from(metadata['model']['config']['content'])
    with without_weights():
        model: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        if 'peft_config' in metadata['model']:
            import peft

            settings = peft.PeftConfig.from_peft_type(**metadata['model']['peft_config']['content'])
            model = peft.get_peft_model(model, settings)
    return model


def _merged_stock_state(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's own unloading: these adapters may be of any of its kinds, unlike those of ``build.merged_state``."""
    if not hasattr(model, 'merge_and_unload'):
        return model.state_dict()
    # Merging changes weights in place, and these may be the live ones.
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model.merge_and_unload().state_dict()  # pyright: ignore


def _tell_facts(config: Any, facts: Mapping[str, Any]) -> None:
    """Set in the config's ``dhrd`` what is known, in the place of what was of the weights that these began as."""
    known = {key: dict(value) for key, value in facts.items() if value}
    before = getattr(config, 'dhrd', None) or {}
    if known or before:
        config.dhrd = {**{key: value for key, value in before.items() if key not in facts}, **known}


def _divide_last_layer(weights: Mapping[str, Tensor], num_labels: int, temperature: float) -> dict[str, Tensor]:
    """The weights, those of the layer that makes the logits divided: it stands last in every classifier."""
    if temperature == 1:
        return dict(weights)
    last = [name for name, value in weights.items() if value.ndim == 2 and len(value) == num_labels][-1]
    names = {last, f'{last.removesuffix("weight")}bias'}
    return {
        name: (value.float() / temperature).to(value.dtype) if name in names else value
        for name, value in weights.items()
    }


def _cast(config: PretrainedConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    if dtype is None:  # that of the backbone: the config may tell the type of the checkpoint that it began as
        setattr(config, DTYPE, next(value.dtype for value in weights.values() if value.is_floating_point()))
        return weights
    setattr(config, DTYPE, dtype)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    check_finite(cast)  # fp16 ends at 65504
    return cast


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _write_model(config: PretrainedConfig, weights: Mapping[str, Tensor], tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        # Without it transformers' pipeline loads no tokenizer for a model type that it does not know.
        config.tokenizer_class = tokenizer_class(type(tokenizer).__name__)
        with user_errors(f'{folder}: cannot be written'):  # tokenizers raises a plain Exception
            # Several templates are files of a folder otherwise.
            save_tokenizer(tokenizer, folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
    config.save_pretrained(folder)
    if isinstance(config, slim.SlimClassifierConfig):
        for module in (slim, heads):
            shutil.copy(str(module.__file__), folder)
    owned = {name: _owned(value) for name, value in weights.items()}
    with user_errors(f'{folder}: cannot be written', SafetensorError):  # what the operating system refused
        save_torch_state_dict(owned, folder, metadata={'format': 'pt'}, force_contiguous=False)
    for path in folder.glob('*.safetensors'):
        shutil.copymode(folder / 'config.json', path)  # safetensors lets nobody else read


def add_onnx(folder: str | Path, kind: str = 'fp32', rows: Sequence[Row] = (), of: str = '') -> None:
    """Add ``model.onnx`` to a slim export, in fp32, of dynamic batch and length; and one with int8 weights on request.

    Args:
        folder: of :func:`write_slim`; on failure it stays as it is.
        kind: ``'int8'`` adds ``model-int8.onnx`` besides, and to the card how far it answers as the other does.
            Default: ``'fp32'``.
        rows: to compare the two on. Default: a few made ones.
        of: the evaluation set of ``rows``, for the card.

    Raises:
        UserError: the model cannot be written so, or ONNX Runtime does not answer as it does.
    """
    folder = Path(folder)
    with staged(folder) as scratch, user_errors('onnx'):
        try:
            model = load_slim(folder, attn_implementation='eager', **{DTYPE: torch.float32})
            write_onnx(model, scratch / NAME)
            check_answers(model, scratch / NAME)
            if kind == 'int8':
                if not rows:
                    batch = made_rows(model)
                    unknown = torch.full((len(batch['input_ids']), 1), IGNORE_INDEX)
                    rows, of = rows_of({**batch, 'labels': unknown}), 'made-up tokens'
                write_int8(scratch / NAME, scratch / INT8)
                files = [OnnxClassifier(scratch / name, folder) for name in (NAME, INT8)]
                card = (folder / 'README.md').read_text(encoding='utf-8')
                card = with_int8(card, compare(files[0], files[1], rows, of))
                (scratch / 'README.md').write_text(card, encoding='utf-8')
        except Exception as error:
            raise UserError(
                f'onnx: {one_line(error, kind=not isinstance(error, UserError))}; the export in {folder} is whole '
                f'without {NAME}'
            ) from error
        for path in sorted(scratch.iterdir(), key=lambda path: path.suffix == '.onnx'):  # the weights first
            os.replace(path, folder / path.name)


def network_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the model inside a ``HuggingFaceModel``, from its whole state dict.

    Args:
        state: of the ``HuggingFaceModel``; anything that is not a tensor is left out.

    Returns:
        Names as in the model inside.
    """
    return {
        name.removeprefix(_NETWORK): value
        for name, value in state.items()
        if name.startswith(_NETWORK) and isinstance(value, Tensor)
    }


def _owned(value: Tensor) -> Tensor:
    """A contiguous tensor that is all of its storage; FSDP gathers into padded ones, which safetensors refuses."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
