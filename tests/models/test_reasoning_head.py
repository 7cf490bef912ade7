"""A pipeline's own model with a reasoning head: the reference's gradients, and nothing else changed."""

import copy
from types import SimpleNamespace

import pytest
import reference
import torch
import transformers
from composer.models import HuggingFaceModel
from elsewhere import load_elsewhere
from forks import run_ranks
from peft import LoraConfig
from safetensors import safe_open
from stock import CASES, SHAPES, build, case_gradients, collator, fit, stock_classifier, tokenised
from tiny import LABELS, VOCAB, WORDS, exact, relative_error, tiny_classifier, tiny_lm, tiny_tokenizer, triplets
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dhrd_plugin import AuxiliaryReasoningLoss, ComposerDualHeadClassifier, DropReasoningHead, apply_reasoning_head
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.build import load_slim

pytestmark = pytest.mark.usefixtures('one_thread')

ROWS = triplets(8)
QV = ['q_proj', 'v_proj']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The causal LM under each classifier, saved."""
    root = tmp_path_factory.mktemp('lms')
    for kind in SHAPES:
        stock_classifier(kind, root / kind)
    return root


def algorithm(folder=None, **weights):
    return AuxiliaryReasoningLoss(**weights, pretrained_model_name_or_path=folder and str(folder))


def causal_lm(inner):
    """A causal LM that shares the classifier's weights, for the reference."""
    config = copy.deepcopy(inner.config)
    config.tie_word_embeddings = False
    lm = AutoModelForCausalLM.from_config(config)
    setattr(lm, lm.base_model_prefix, inner.base_model)
    lm.lm_head.weight = getattr(inner, 'lm_head', inner.get_input_embeddings()).weight
    return lm


def reference_loss(inner, rows, alpha=1.0, beta=1.0):
    parts = SimpleNamespace(causal_lm=causal_lm(inner), classifier=SimpleNamespace(out_proj=inner.score))
    return reference.total_loss(parts, rows, VOCAB, LABELS, alpha, beta)


def series(log, *names):
    return [[float(value) for _, value in log.data[name]] for name in names]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------- losses and gradients


@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('untied', [True, False])
@pytest.mark.parametrize('side', ['right', 'left'])
def test_the_gradients_are_the_references(folder, kind, untied, side):
    weights = {'alpha': 0.5, 'beta': 2.0}
    model = stock_classifier(kind)
    apply_reasoning_head(model, str(folder / kind) if untied else None)
    loss = reference_loss(model.model, ROWS, **weights)
    expected = {f'model.{name}': grad for name, grad in reference.gradients(loss, model.model).items()}
    assert ('model.lm_head.weight' in expected) == untied
    for microbatch in (8, 3):
        added = stock_classifier(kind)
        options = {'rows': tokenised(), 'collate_fn': collator(side), 'batches': 1, 'microbatch': microbatch}
        _, log, (found,) = fit(added, [algorithm(folder / kind if untied else None, **weights)], **options)
        assert relative_error(found, expected) <= 1e-5
        assert series(log, 'loss/train/total') == [[pytest.approx(float(loss), rel=1e-5)]]


@pytest.fixture(scope='module')
def two_ranks(root, folder, tmp_path_factory):
    """Gradients of both ranks, of all cases, from one launch."""
    out = tmp_path_factory.mktemp('ranks')
    (out / 'lm').symlink_to(folder / 'llama')
    run_ranks(2, 'tests/stock.py', out, cwd=root)
    return [torch.load(out / f'rank{rank}.pt', weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize('case', CASES)
def test_two_ranks_change_no_gradient(case, folder, two_ranks):
    """Nor does DDP hang where a rank, or the step, leaves the LM head unread."""
    expected = case_gradients(case, folder / 'llama')
    for rank in two_ranks:
        assert len(rank[case]) == len(expected) == 2
        for found, step in zip(rank[case], expected):
            assert relative_error(found, step) <= 1e-5


# ------------------------------------------------------------------- what is pooled, what is run


@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('side', ['right', 'left'])
def test_no_rationale_or_answer_token_reaches_the_class_logits(kind, side):
    model = exact(stock_classifier(kind)).eval()
    alone = torch.cat(
        [  # the stock model on each input alone, unpadded
            model({'input_ids': torch.tensor([row['input_ids']])}).logits for row in tokenised(rationales=False)
        ]
    )
    apply_reasoning_head(model)
    batch = collator(side)(tokenised())
    asked = {**batch, 'return_reasoning_loss': True}
    out = model(asked)
    torch.testing.assert_close(out.logits, alone, atol=1e-10, rtol=0)
    torch.testing.assert_close(model(batch).logits, out.logits, atol=1e-10, rtol=0)
    columns = torch.arange(batch['input_ids'].shape[1])
    after = (columns > batch['pool_index'][:, None]) & batch['attention_mask'].bool()
    assert after.any(1).sum() == 6
    for seed in range(3):
        torch.manual_seed(seed)
        noise = torch.randint(len(WORDS), batch['input_ids'].shape)
        changed = model({**asked, 'input_ids': torch.where(after, noise, batch['input_ids'])})
        assert torch.equal(changed.logits, out.logits) and torch.equal(changed.loss, out.loss)
        assert not torch.equal(changed.reasoning_loss, out.reasoning_loss)


def test_evaluation_neither_runs_nor_reads_a_rationale():
    model = apply_reasoning_head(stock_classifier()).eval()
    lengths = []
    model.model.base_model.register_forward_hook(lambda module, args, out: lengths.append(out[0].shape[1]))
    logits = [model.eval_forward(collator()(tokenised(rationales=flag))) for flag in (True, False)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    assert lengths == [max(len(row['input_ids']) for row in tokenised())] * 2


@pytest.mark.parametrize('kind', ['gpt2', 'gpt_neo', 'biogpt', 'llama'])
@pytest.mark.parametrize('side', ['left', 'right'])
def test_rows_with_and_without_a_rationale_have_the_same_positions(kind, side):
    """Also where positions are absolute, and padding on the left moves them."""
    shape = {'vocab_size': len(VOCAB), 'hidden_size': 16, 'pad_token_id': 0, 'num_labels': 3, 'initializer_range': 0.3}
    shape |= {'attention_types': [[['global', 'local'], 1]]} if kind == 'gpt_neo' else {}
    layers = {'num_layers': 2, 'num_heads': 2} if kind == 'gpt_neo' else {}
    layers = layers or {'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 24}
    layers.pop('intermediate_size' if kind == 'gpt2' else '', None)
    config = AutoConfig.for_model(kind, **shape, **layers, max_position_embeddings=64, tie_word_embeddings=True)
    torch.manual_seed(0)
    inner = AutoModelForSequenceClassification.from_config(config)
    model = apply_reasoning_head(HuggingFaceModel(inner, tiny_tokenizer())).eval()
    plain = model(collator(side)(tokenised(rationales=False))).logits
    asked = {**collator(side)(tokenised()), 'return_reasoning_loss': True}
    if side == 'left' and not inner.pads_left:
        # The stock model of transformers 4 takes another token for the last one.
        assert kind == 'biogpt' and transformers.__version__ < '5'
        with pytest.raises(UserError, match='padding_side: found padding on the left, which changes what BioGpt'):
            model(asked)
        return
    both = model(collator(side)(tokenised())).logits
    torch.testing.assert_close(both, plain, atol=1e-6, rtol=0)
    asked = model(asked).logits
    torch.testing.assert_close(asked, plain, atol=1e-6, rtol=0)
    assert plain.std(0).min() > 1e-3


def test_a_row_that_ends_on_the_pad_token_is_pooled_where_the_stock_model_pools_it():
    """transformers pools the last token that is no pad, so pad == eos and a trailing eos shift it."""
    model, rows = stock_classifier().eval(), tokenised()[:2]
    for row in rows:
        row['input_ids'], row['attention_mask'] = [*row['input_ids'], 0], [*row['attention_mask'], 1]
    alone = model(collator()([{**row, 'rationale': None} for row in rows])).logits
    apply_reasoning_head(model)
    out = model({**collator()(rows), 'return_reasoning_loss': True})
    torch.testing.assert_close(out.logits, alone, atol=1e-6, rtol=0)


class MeanPooled(LlamaForSequenceClassification):
    """A user's own forward pass: it pools all that the attention mask covers, and weighs the classes."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        logits = self.score((hidden * mask).sum(1) / mask.sum(1))
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=logits.dtype)
        return SequenceClassifierOutput(torch.nn.functional.cross_entropy(logits, labels, weight), logits)


def test_a_users_own_forward_is_shown_the_input_alone():
    inner = stock_classifier().model
    inner.__class__ = MeanPooled
    model = exact(HuggingFaceModel(inner, tiny_tokenizer())).eval()
    expected = model(collator()(tokenised(rationales=False)))
    out = apply_reasoning_head(model)({**collator()(tokenised()), 'return_reasoning_loss': True})
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-10, rtol=0)
    assert (out.reasoning_loss > 0).sum() == 6


@pytest.mark.parametrize('problem', ['regression', 'multi_label_classification'])
def test_the_stock_loss_of_other_problems_is_kept(problem):
    model = stock_classifier(problem_type=problem)
    batch = collator()(tokenised())
    batch['labels'] = torch.randn(8, 3) if problem == 'regression' else torch.randint(2, (8, 3)).float()
    expected = model(
        {key: value for key, value in collator()(tokenised(rationales=False)).items() if key != 'labels'}
        | {'labels': batch['labels']}
    ).loss
    out = apply_reasoning_head(model)({**batch, 'return_reasoning_loss': True})
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('alpha', [1.0, 0.0])
def test_labels_of_as_many_classes_as_there_are_columns_stay_whole(alpha):
    """A microbatch's columns that are all padding are cut from all that stands by token."""
    batch = collator()(tokenised())
    count = batch['input_ids'].shape[1]
    model = apply_reasoning_head(stock_classifier(num_labels=count, problem_type='multi_label_classification'))
    labels = torch.randint(2, (8, count), generator=torch.Generator().manual_seed(0)).float()
    short = int(batch['attention_mask'].sum(1).argmin())
    cut = {key: value[short : short + 1] for key, value in batch.items() if isinstance(value, torch.Tensor)}
    given = {**cut, 'labels': labels[short : short + 1], 'return_reasoning_loss': alpha > 0}
    out = model(given)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, given['labels'])
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)


def test_a_config_that_asks_for_tuples_trains_alike():
    try:
        stock_classifier(return_dict=False).model(input_ids=torch.ones(1, 2, dtype=torch.long))
    except AttributeError as error:
        pytest.skip(
            f'transformers {transformers.__version__}, modeling_layers.py, GenericForSequenceClassification: {error}'
        )
    logs = [
        fit(stock_classifier(return_dict=flag), [algorithm()], tokenised(), collator())[1] for flag in (True, False)
    ]
    assert series(logs[0], 'loss/train/total', 'loss/train/reasoning') == series(
        logs[1], 'loss/train/total', 'loss/train/reasoning'
    )


def test_a_compiled_model_has_its_decoder_in_one_graph():
    sizes = []

    def backend(graph, inputs):
        sizes.append(sum('scaled_dot_product' in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    logs = []
    for options in ({'compile_config': {'backend': backend}}, {}):
        logs.append(fit(stock_classifier(), [algorithm()], tokenised(), collator(), batches=1, **options)[1])
    assert 2 in sizes  # both layers
    compiled, eager = (series(log, 'loss/train/total', 'loss/train/reasoning') for log in logs)
    assert compiled == [pytest.approx(values, rel=1e-5) for values in eager]


# --------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize('untied', [True, False])
def test_without_rationales_it_trains_as_before_bit_for_bit(folder, untied):
    runs = []
    for algorithms, collate_fn in (([], None), ([algorithm(folder / 'llama' if untied else None)], collator())):
        rows = tokenised(rationales=False)
        trainer, log, _ = fit(stock_classifier(), algorithms, rows, collate_fn, batches=4, microbatch=4)
        weights = {name: value for name, value in trainer.state.model.state_dict().items() if 'lm_head' not in name}
        runs.append((series(log, 'loss/train/total', 'metrics/train/MulticlassAccuracy'), weights))
    assert runs[0][0] == runs[1][0] and len(set(runs[0][0][0])) == 4
    assert same(runs[0][1], runs[1][1])


def groups_of(model):
    """An AdamW of three groups of unlike settings; the embedding's is the first."""
    embedding, head = model.model.get_input_embeddings().weight, model.model.score.weight
    rest = [p for p in model.parameters() if p is not embedding and p is not head]
    return torch.optim.AdamW(
        [{'params': [embedding], 'lr': 1e-3, 'weight_decay': 0.0}, {'params': rest}, {'params': [head], 'lr': 1e-1}]
    )


def test_of_several_optimizers_one_trains_the_new_head(folder):
    model = stock_classifier()
    embedding, *rest = model.parameters()
    optimizers = [torch.optim.SGD([embedding], lr=0.1), torch.optim.SGD(rest, lr=0.1)]
    apply_reasoning_head(model, str(folder / 'llama'), optimizers)
    head = model.model.lm_head.weight
    before, head.grad = head.detach().clone(), torch.ones_like(head)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(head.detach(), before - 0.1)


@pytest.mark.parametrize('untied', [True, False])
def test_the_optimizers_state_and_groups_survive_in_mid_training(folder, untied):
    model = stock_classifier()
    optimizer = groups_of(model)
    fit(model, optimizer=optimizer, batches=3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = list(optimizer.state)
    before = copy.deepcopy([optimizer.state[parameter] for parameter in parameters])
    groups = [({k: v for k, v in g.items() if k != 'params'}, list(g['params'])) for g in optimizer.param_groups]

    apply_reasoning_head(model, str(folder / 'llama') if untied else None, optimizer)
    assert list(optimizer.state) == parameters
    assert all(same(optimizer.state[parameter], state) for parameter, state in zip(parameters, before))
    assert {p: name for name, p in model.named_parameters() if 'lm_head' not in name} == names
    new = [model.model.lm_head.weight] if untied else []
    for index, (group, (settings, params)) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        assert {k: v for k, v in group.items() if k != 'params'} == settings
        expected = params + (new if index == 0 else [])
        assert len(group['params']) == len(expected)
        assert all(one is other for one, other in zip(group['params'], expected))

    # The step that follows is the one that AdamW with that state makes: a straight run's.
    straight = stock_classifier()
    other = groups_of(straight)
    fit(straight, optimizer=other, batches=3)
    fit(straight, optimizer=other, batches=2)
    fit(model, [algorithm()], optimizer=optimizer, batches=2)
    found, expected = (dict(m.named_parameters()) for m in (model, straight))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_frozen_embedding_keeps_the_reasoning_head_frozen(folder):
    model = stock_classifier()
    model.model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    count = len(optimizer.param_groups[0]['params'])
    apply_reasoning_head(model, str(folder / 'llama'), optimizer)
    assert not model.model.lm_head.weight.requires_grad and len(optimizer.param_groups[0]['params']) == count
    fit(model, [algorithm()], tokenised(), collator(), optimizer=optimizer)


def test_the_model_stays_what_it_was(folder):
    model = stock_classifier()
    inner, tokenizer, metrics, names = model.model, model.tokenizer, model.train_metrics, list(model.state_dict())
    kind = type(inner)
    assert apply_reasoning_head(model) is model and apply_reasoning_head(model, str(folder / 'llama')) is model
    assert model.model is inner and isinstance(inner, kind) and type(inner).__name__ == kind.__name__
    assert model.tokenizer is tokenizer and model.train_metrics is metrics and list(model.state_dict()) == names
    assert apply_reasoning_head(stock_classifier(), str(folder / 'llama')).model.lm_head.weight.equal(
        AutoModelForCausalLM.from_pretrained(folder / 'llama').lm_head.weight
    )


def test_a_tied_checkpoint_brings_no_new_parameter(tmp_path):
    tiny_lm(tied=True).save_pretrained(tmp_path)
    model = stock_classifier()
    names = list(model.state_dict())
    assert list(apply_reasoning_head(model, str(tmp_path)).state_dict()) == names


def test_a_grown_vocabulary_grows_the_reasoning_head(folder):
    """Markers that are added tokens."""
    model = stock_classifier()
    model.model.resize_token_embeddings(len(VOCAB) + 2)
    apply_reasoning_head(model, str(folder / 'llama'))
    assert model.model.lm_head.weight.shape[0] == len(VOCAB) + 2


@pytest.mark.parametrize('untied', [True, False])
@pytest.mark.parametrize('adapters', [False, True])
def test_the_score_may_begin_as_the_lm_heads_rows_of_the_answers(folder, untied, adapters):
    model = stock_classifier(peft_config=lora('llama') if adapters else None).eval()
    apply_reasoning_head(model, str(folder / 'llama') if untied else None, answers=LABELS)
    inner = model.model.base_model.model if adapters else model.model
    head = getattr(inner, 'lm_head', inner.get_input_embeddings())
    assert hasattr(inner, 'lm_head') == untied
    assert torch.equal(inner.score.weight, head.weight[[VOCAB[label] for label in LABELS]])
    batch = collator()(tokenised(rationales=False))
    with torch.no_grad():
        lm_logits = causal_lm(inner)(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
    last = lm_logits[torch.arange(8), batch['attention_mask'].sum(1) - 1]
    torch.testing.assert_close(model(batch).logits, last[:, [VOCAB[label] for label in LABELS]], atol=1e-6, rtol=0)


def test_our_own_model_is_left_alone():
    model = tiny_classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert apply_reasoning_head(model, 'nowhere', label_names=['a']) is model and same(model.state_dict(), before)


# ------------------------------------------------------------------------- checkpoints, exports


@pytest.mark.parametrize('untied', [True, False])
def test_a_checkpoint_from_before_the_surgery_loads(folder, tmp_path, untied):
    old = fit(stock_classifier(), save_folder=str(tmp_path), save_filename='old.pt')[0].state.model
    added = algorithm(folder / 'llama' if untied else None)
    model = stock_classifier()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    options = {'load_path': str(tmp_path / 'old.pt'), 'load_weights_only': untied}
    trainer = build(model, [added], tokenised(), collator(), **options)[0]
    found = {name: value for name, value in trainer.state.model.state_dict().items() if 'lm_head' not in name}
    assert same(found, old.state_dict())
    if untied:
        assert model.model.lm_head.weight.equal(AutoModelForCausalLM.from_pretrained(folder / 'llama').lm_head.weight)


def test_a_resumed_run_is_a_straight_one(folder, tmp_path):
    options = {'algorithms': [algorithm(folder / 'llama')], 'rows': tokenised() * 2, 'collate_fn': collator()}
    straight, log, _ = fit(stock_classifier(), batches=4, **options)
    fit(stock_classifier(), batches=2, save_folder=str(tmp_path), save_filename='half.pt', **options)
    resumed, again, _ = fit(stock_classifier(), batches=4, load_path=str(tmp_path / 'half.pt'), **options)
    assert series(log, 'loss/train/total')[0][2:] == series(again, 'loss/train/total')[0]
    assert same(straight.state.model.state_dict(), resumed.state.model.state_dict())
    inner, _ = HuggingFaceModel.hf_from_composer_checkpoint(str(tmp_path / 'half.pt'))
    assert type(inner).__module__.startswith('transformers') and not hasattr(inner, 'lm_head')


def test_save_pretrained_writes_the_stock_classifier(folder, tmp_path):
    model = apply_reasoning_head(stock_classifier(), str(folder / 'llama')).eval()
    model.model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    batch = collator()(tokenised(rationales=False))
    assert torch.equal(loaded.eval()(**batch).logits, model(batch).logits)


def test_a_deep_copy_works_apart(folder):
    model = apply_reasoning_head(stock_classifier(), str(folder / 'llama'))
    twin = copy.deepcopy(model)
    batch = {**collator()(tokenised()), 'return_reasoning_loss': True}
    expected = model(batch)
    twin.model.lm_head.weight.data.zero_()
    assert torch.equal(model(batch).reasoning_loss, expected.reasoning_loss)
    assert not torch.equal(twin(batch).reasoning_loss, expected.reasoning_loss)


def lora(kind):
    return LoraConfig(task_type='SEQ_CLS', r=2, lora_dropout=0.0, target_modules=['c_attn'] if kind == 'gpt2' else QV)


EXPORTS = {
    'llama-tied': ('llama', False, False),
    'gpt2-untied': ('gpt2', True, False),
    'qwen3-untied-lora': ('qwen3', True, True),
    'gpt2-tied-lora': ('gpt2', False, True),
    'mistral-untied': ('mistral', True, False),
}


@pytest.fixture(scope='module')
def exports(folder, tmp_path_factory):
    """What the trained models say of the inputs, and what a process without the package makes of the folders."""
    root = tmp_path_factory.mktemp('exports')
    batch, expected = collator()(tokenised(rationales=False)), {}
    for name, (kind, untied, adapters) in EXPORTS.items():
        model = stock_classifier(kind, peft_config=lora(kind) if adapters else None)
        before = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
        callback = DropReasoningHead(str(root / name / 'slim'))
        trained = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        fit(
            model,
            [algorithm(folder / kind if untied else None)],
            tokenised(),
            collator(),
            batches=3,
            optimizer=trained,
            callbacks=[callback],
        )
        assert all(torch.equal(value, before[key]) for key, value in model.named_parameters() if key in before)
        model.eval()
        with torch.no_grad():
            expected[name] = model(batch)
    return root, expected, load_elsewhere(root, [row['input_text'] for row in ROWS], batch['labels'])


@pytest.mark.parametrize('name', EXPORTS)
def test_the_export_is_the_stock_classifier(exports, name):
    root, expected, found = exports
    out = found[name]
    assert not any(out['info'].values())
    assert out['class'].lower() == f'{name.split("-")[0]}forsequenceclassification'
    torch.testing.assert_close(out['logits'], expected[name].logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(out['loss'], expected[name].loss, atol=1e-5, rtol=0)
    assert expected[name].logits.std(0).min() > 1e-3  # not one answer for all
    assert out['id2label'] == dict(enumerate(LABELS))
    with safe_open(root / name / 'slim' / 'model.safetensors', 'pt') as file:
        keys = list(file.keys())
    assert not [key for key in keys if 'lm_head' in key or 'lora' in key or 'base_layer' in key]
    assert not list((root / name / 'slim').glob('*.py'))


@pytest.mark.parametrize('kind', ['qwen3', 'gpt2'])
def test_adapters_and_head_alone_are_trained(folder, kind):
    """LoRA as peft makes it; the reasoning head is frozen with the embedding."""
    model = stock_classifier(kind, peft_config=lora(kind))
    _, log, (grads, *_) = fit(model, [algorithm(folder / kind)], tokenised(), collator())
    assert grads and all('lora_' in name or 'score.modules_to_save' in name for name in grads)
    assert any('lora_B' in name and grad.any() for name, grad in grads.items())
    assert 'lm_head.weight' in dict(model.model.base_model.model.named_parameters())
    assert all(loss > 0 for loss in series(log, 'loss/train/reasoning')[0])


# ---------------------------------------------------------------------------------- a causal LM


def causal_model(kind='llama', metrics=None):
    return HuggingFaceModel(tiny_lm(kind), tiny_tokenizer(), metrics=metrics, use_logits=True)


@pytest.mark.parametrize('kind', ['llama', 'gpt2'])
def test_a_causal_lm_becomes_the_dual_head_classifier(kind, tmp_path):
    metrics = [MulticlassAccuracy(num_classes=3, average='macro')]
    model = causal_model(kind, metrics)
    inner, tokenizer = model.model, model.tokenizer
    optimizer = torch.optim.AdamW([{'params': list(model.parameters()), 'lr': 0.01}, {'params': [], 'lr': 1.0}])
    apply_reasoning_head(model, label_names=LABELS, optimizers=optimizer, head='linear', answers=LABELS)
    assert torch.equal(model.network.classifier.out_proj.weight, inner.lm_head.weight[[VOCAB[x] for x in LABELS]])
    assert isinstance(model, ComposerDualHeadClassifier) and model.network.causal_lm is inner
    assert model.network.lm_head is inner.lm_head and model.network.classifier.kind == 'linear'
    assert model.tokenizer is tokenizer and list(model.train_metrics.values()) == metrics
    assert optimizer.param_groups[0]['params'][-1] is model.network.classifier.out_proj.weight

    expected = {
        f'model.{name}': grad
        for name, grad in reference.gradients(
            reference.total_loss(model.network, ROWS, VOCAB, LABELS), model.network
        ).items()
    }
    callback = DropReasoningHead(str(tmp_path / 'slim'))
    options = {'rows': tokenised(), 'collate_fn': collator(), 'optimizer': optimizer, 'callbacks': [callback]}
    trainer, _, (found, *_) = fit(model, [algorithm()], **options)
    assert relative_error(found, expected) <= 1e-5
    assert trainer.state.train_metrics['MulticlassAccuracy'].average == 'macro'
    loaded = load_slim(tmp_path / 'slim')
    batch = collator()(tokenised(rationales=False))
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(batch).logits, atol=1e-5, rtol=0)


def test_the_algorithm_makes_a_classifier_of_a_causal_lm():
    model = causal_model()
    _, log, steps = fit(model, [AuxiliaryReasoningLoss(label_names=LABELS)], tokenised(), collator(), batches=3)
    assert model.label_names == LABELS and model.network.classifier.kind == 'mlp'
    assert 'model.classifier.dense.weight' in steps[0]
    assert series(log, 'loss/train/total')[0][2] < series(log, 'loss/train/total')[0][0]
    assert 'MulticlassF1Score' in model.train_metrics


# ------------------------------------------------------------------------------- what is refused


class Sub(HuggingFaceModel):
    pass


def bert():
    config = BertConfig(vocab_size=80, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return HuggingFaceModel(BertForSequenceClassification(config), tiny_tokenizer())


def t5():
    config = T5Config(vocab_size=80, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return HuggingFaceModel(T5ForSequenceClassification(config), tiny_tokenizer())


@pytest.mark.parametrize(
    ('model', 'options', 'reason'),
    [
        (bert, {}, 'BertForSequenceClassification: an encoder reads the rationale when it pools the input'),
        (t5, {}, 'T5ForSequenceClassification: an encoder reads the rationale'),
        (lambda: torch.nn.Linear(2, 2), {}, 'found a model of type Linear; expected a HuggingFaceModel around'),
        (lambda: HuggingFaceModel(LlamaModel(tiny_lm().config)), {}, 'found a LlamaModel; expected a HuggingFaceModel'),
        (lambda: stock_classifier(pad_token_id=None), {}, 'LlamaForSequenceClassification: found pad_token_id None'),
        (
            lambda: stock_classifier(pad_token_id=5),
            {},
            'LlamaForSequenceClassification: found pad_token_id 5 in its config and 0 in its tokenizer',
        ),
        (
            lambda: stock_classifier(tie_word_embeddings=False),
            {},
            'pretrained_model_name_or_path: missing; the LM head of this LlamaForSequenceClassification is not tied',
        ),
        (stock_classifier, {'label_names': LABELS}, 'label_names: found with LlamaForSequenceClassification'),
        (stock_classifier, {'head': 'mlp'}, 'head: found with LlamaForSequenceClassification'),
        (stock_classifier, {'pretrained_model_name_or_path': '/nowhere'}, "cannot load '/nowhere'"),
        (stock_classifier, {'pretrained_model_name_or_path': 'gpt2'}, 'found a gpt2 of hidden size 16; expected'),
        (causal_model, {}, 'label_names: missing; LlamaForCausalLM has no classes'),
        (lambda: Sub(tiny_lm(), tiny_tokenizer()), {'label_names': LABELS}, 'found Sub around LlamaForCausalLM'),
        (causal_model, {'label_names': LABELS, 'pooling': 'max'}, "pooling: found 'max'"),
        (causal_model, {'label_names': LABELS, 'answers': LABELS}, "answers: found with head, pooling ('mlp', 'last')"),
        (stock_classifier, {'answers': LABELS[:2]}, "answers: found ['yes', 'no']; expected one for each of 3 classes"),
        (stock_classifier, {'answers': 'yes'}, "answers: found 'yes'; expected one for each of 3 classes"),
        (stock_classifier, {'answers': ['a', 'b', 'c']}, "answers: 'a' and 'b' are the same row of the LM head"),
        (
            lambda: HuggingFaceModel(stock_classifier().model),
            {'answers': LABELS},
            'answers: found without a tokenizer; expected a model that has its own',
        ),
        (
            causal_model,
            {'label_names': LABELS, 'pretrained_model_name_or_path': 'x'},
            'pretrained_model_name_or_path: found with LlamaForCausalLM, whose own LM head',
        ),
    ],
)
def test_what_it_cannot_be_applied_to_is_refused_in_one_line(folder, model, options, reason):
    if options.get('pretrained_model_name_or_path') == 'gpt2':
        options = {'pretrained_model_name_or_path': str(folder / 'gpt2')}
    found = model()
    kinds = type(found), type(getattr(found, 'model', None))
    with pytest.raises(UserError) as error:
        apply_reasoning_head(found, **options)
    assert reason in str(error.value) and '\n' not in str(error.value)
    assert kinds == (type(found), type(getattr(found, 'model', None)))  # nothing half done


def test_an_encoder_is_refused_before_any_step():
    with pytest.raises(UserError, match='an encoder reads the rationale'):
        fit(bert(), [AuxiliaryReasoningLoss()], tokenised(), collator())


def test_two_instances_are_refused_before_the_model_is_touched():
    model = stock_classifier()
    with pytest.raises(UserError, match='found two instances'):
        fit(model, [AuxiliaryReasoningLoss(), AuxiliaryReasoningLoss(alpha=2.0)])
    assert type(model.model) is LlamaForSequenceClassification


@pytest.mark.filterwarnings('default')
def test_batches_without_rationales_are_told_once_and_the_collator_named(recwarn):
    fit(stock_classifier(), [AuxiliaryReasoningLoss()], batches=3, microbatch=2)
    told = [str(warning.message) for warning in recwarn if 'no rationale' in str(warning.message)]
    assert len(told) == 1 and 'dhrd_plugin.RationaleCollator' in told[0]
    fit(stock_classifier(), [AuxiliaryReasoningLoss()], tokenised(), collator(), batches=2)
    assert len([w for w in recwarn if 'no rationale' in str(w.message)]) == 1


def test_a_forward_that_drops_our_fields_is_told():
    class Own(HuggingFaceModel):
        def forward(self, batch):
            return self.model(**{key: batch[key] for key in ('input_ids', 'attention_mask', 'labels')})

    model = Own(stock_classifier().model, tiny_tokenizer())
    with pytest.raises(UserError, match='found no reasoning_loss in the output of Own; its forward must hand'):
        fit(model, [AuxiliaryReasoningLoss()], tokenised(), collator())
