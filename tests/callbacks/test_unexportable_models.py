"""A model that its config does not describe is refused before the training that its export would lose."""

import json

import peft
import pytest
from composer import Callback
from composer.models import HuggingFaceModel
from stock import collator, fit, stock_classifier, tokenised
from tiny import LABELS, tiny_lm, tiny_tokenizer, triplets

from dhrd_plugin import (
    AuxiliaryReasoningLoss,
    ComposerDualHeadClassifier,
    DropReasoningHead,
    DualHeadNetwork,
    TripletCollator,
)
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.build import build_causal_lm

pytestmark = pytest.mark.usefixtures('one_thread')
QUERIES = {'r': 2, 'target_modules': ['q_proj']}
OWN = """from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = 'own'


class OwnLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


class Steps(Callback):
    def __init__(self):
        self.seen = 0

    def batch_end(self, state, logger):
        self.seen += 1


def stock_with_an_adapter(folder):
    model = stock_classifier()
    peft.inject_adapter_in_model(peft.LoraConfig(**QUERIES), model.model)
    return model


def stock_with_an_adapter_of_another_name(folder):
    model = stock_classifier()
    settings = peft.LoraConfig(task_type='SEQ_CLS', **QUERIES)
    inner = peft.get_peft_model(model.model, settings, adapter_name='mine')
    return HuggingFaceModel(inner, tiny_tokenizer(), use_logits=True)


def dual_with_an_adapter(folder):
    lm = tiny_lm()
    peft.inject_adapter_in_model(peft.LoraConfig(**QUERIES), lm)
    return ComposerDualHeadClassifier(DualHeadNetwork(lm, len(LABELS)), tiny_tokenizer(), LABELS)


def dual_of_code_of_its_own(folder):
    tiny_lm().save_pretrained(folder)
    (folder / 'own.py').write_text(OWN)
    config = json.loads((folder / 'config.json').read_text())
    config |= {'model_type': 'own', 'auto_map': {'AutoConfig': 'own.OwnConfig', 'AutoModelForCausalLM': 'own.OwnLM'}}
    (folder / 'config.json').write_text(json.dumps(config))
    lm = build_causal_lm(str(folder), trust_remote_code=True)
    return ComposerDualHeadClassifier(DualHeadNetwork(lm, len(LABELS)), tiny_tokenizer(), LABELS)


@pytest.mark.parametrize(
    'make, words',
    [
        (stock_with_an_adapter, 'found a model with other weights than its description builds'),
        (stock_with_an_adapter_of_another_name, 'found a model with other weights than its description builds'),
        (dual_with_an_adapter, 'found a model with other weights than its description builds'),
        (dual_of_code_of_its_own, 'the model cannot be built from its config'),
    ],
)
def test_a_model_that_cannot_be_rebuilt_is_refused_before_training(tmp_path, make, words):
    model, steps = make(tmp_path), Steps()
    data = (triplets(8), TripletCollator(tiny_tokenizer(), LABELS))
    data = data if isinstance(model, ComposerDualHeadClassifier) else (tokenised(), collator())
    with pytest.raises(UserError, match=f'drop_reasoning_head: {words}'):
        fit(model, [AuxiliaryReasoningLoss()], *data, callbacks=[steps, DropReasoningHead(str(tmp_path / 'slim'))])
    assert not steps.seen and not (tmp_path / 'slim').exists()
