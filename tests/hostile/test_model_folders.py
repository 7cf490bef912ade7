"""A model folder that would run code, or asks on stdin whether it may: it does not, in any verb that opens one."""

import pytest
from damages import CODE, change_json
from omegaconf import OmegaConf
from runs import write_run
from tiny import tiny_lm, tiny_tokenizer

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(params=['model', 'tokenizer'])
def folder(request, tmp_path):
    """Its code makes ``proof`` where it is loaded; the ``refused`` fixture answers with yes whatever asks."""
    folder = tmp_path / 'hostile'
    tiny_lm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / 'code.py').write_text(CODE.format(proof=tmp_path / 'proof', kind='of_its_own', model='LlamaForCausalLM'))
    if request.param == 'model':
        classes = ('AutoModel', 'AutoModelForCausalLM', 'AutoModelForSequenceClassification')
        auto_map = {'AutoConfig': 'code.Config', **dict.fromkeys(classes, 'code.Model')}
        change_json(folder / 'config.json', model_type='of_its_own', auto_map=auto_map)
    else:
        auto_map = {'AutoTokenizer': [None, 'code.Tokenizer']}
        change_json(folder / 'tokenizer_config.json', tokenizer_class='Tokenizer', auto_map=auto_map)
    return folder


@pytest.fixture(scope='module')
def material(tmp_path_factory):
    """The YAML of a run, and its rows."""
    return write_run(tmp_path_factory.mktemp('material'))


@pytest.fixture
def yaml(material, folder, tmp_path):
    """A run with this folder as its model."""
    config = OmegaConf.load(material)
    config.model.pretrained_model_name_or_path = str(folder)
    config.output_dir = str(tmp_path / 'out')
    OmegaConf.save(config, tmp_path / 'run.yaml')
    return tmp_path / 'run.yaml'


@pytest.mark.parametrize('verb', ['predict', 'evaluate', 'train', 'show-batch'])
def test_its_code_is_not_run(refused, folder, yaml, material, tmp_path, verb):
    if verb == 'show-batch' and 'auto_map' not in (folder / 'tokenizer_config.json').read_text():
        pytest.skip('which opens the tokenizer alone')
    arguments = {
        'predict': [folder, 'w1 w2'],
        'evaluate': [folder, material.parent / 'validation.jsonl', '--task', material],
        'train': [yaml],
        'show-batch': [yaml],
    }[verb]
    line = refused(verb, *arguments)
    assert str(folder) in line
    assert not (tmp_path / 'proof').exists()
