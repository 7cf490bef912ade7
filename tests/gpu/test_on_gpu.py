"""The sections that say whether it is right, held to their bars; those of speed stand in the table alone.

Where only part of the tests' packages is installed: ``pytest --noconftest tests/gpu``.
"""

import pytest
import torch
from gpu import parity, product, serving, sharding, speed
from gpu.common import found_by

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')]


def lines_of(section):
    """Its lines, none of which tells of an error."""
    found = found_by(section)
    assert found and not [line for line in found if 'error' in line]
    return found


@pytest.mark.parametrize('section', [parity.parity_tiny, parity.parity_real])
def test_fp32_is_that_of_the_cpu_and_every_way_is_as_near_in_bf16_as_padding(section):
    found = lines_of(section)
    for line in found:
        if line['precision'] == 'fp32':
            assert line['loss_error'] < 1e-5 and line['gradient_error'] < 1e-4, line
        plain = next(
            other
            for other in found
            if (other['way'], other['precision'], other.get('kind')) == ('padded', line['precision'], line.get('kind'))
        )
        assert line['gradient_error'] <= 2 * plain['gradient_error'] + 1e-6, line


def test_the_chunked_loss_is_that_of_full_logits_and_holds_a_tenth_of_them():
    for line in lines_of(parity.loss_memory):
        full = next(other for other in loss_lines('full logits', line['head_trained']))
        assert line['loss'] == pytest.approx(full['loss'], rel=1e-3)
        if line['way'] == 'chunks of 1024':  # as by default; a trained head's gradient is summed up in fp32
            assert line['of_full'] < (0.15 if line['head_trained'] else 0.1), line


def loss_lines(way, trained):
    from gpu.common import LINES

    return [x for x in LINES if x['section'] == 'loss_memory' and (x['way'], x['head_trained']) == (way, trained)]


def test_the_command_trains_evaluates_predicts_and_goes_on_after_a_kill():
    found = {line['way']: line for line in lines_of(product.product)}
    assert found['lora']['metrics'] and found['evaluate']['status'] == found['predict']['status'] == 0
    resumed = found['resume after a kill']
    assert resumed['from_unbroken'] <= 2 * resumed['between_two_unbroken']


def test_an_export_gives_the_labels_of_the_live_model():
    for line in lines_of(product.export):
        assert line['labels_export_live'] == 0 and line['probabilities_export_live'] < 1e-4, line


@pytest.mark.parametrize('section', [sharding.fsdp2, sharding.fsdp1])
def test_one_rank_of_fsdp_is_one_process(section):
    for line in lines_of(section):
        assert line['without_gradient'] == 0 and not line['checkpoint_difference'], line
        assert line['loss_difference'] < (1e-5 if 'fp32' in line['case'] else 0.02), line


def test_no_step_of_ours_waits_for_the_device():
    assert [line['ours'] for line in lines_of(product.syncs)] == [0, 0]


@pytest.mark.parametrize('section', [speed.speed, speed.shapes, product.composer_loop, product.compiled])
def test_what_is_timed_runs(section):
    lines_of(section)


@pytest.mark.parametrize('section', [serving.predict, serving.chain_of_thought])
def test_what_answers_runs(section):
    lines_of(section)
