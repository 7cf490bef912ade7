"""The temperature against a plain search, and what it does to rows that it was not fitted on."""

import pytest
import torch

from dhrd_plugin.calibration import BOUNDS, at_temperature, calibrate, calibration_error, fit_temperature, reliability


def sharpened(temperature, classes=3, count=2000):
    """Logits that are too sharp by a temperature, and labels drawn from what they should say."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=draw) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
    return logits * temperature, labels


@pytest.mark.parametrize('temperature', [0.4, 1.0, 3.0])
@pytest.mark.parametrize('classes', [2, 5])
def test_the_temperature_is_the_one_of_the_least_log_loss(temperature, classes):
    logits, labels = sharpened(temperature, classes)
    found = fit_temperature(logits, labels)
    tried = [found * (1 + step / 100) for step in range(-20, 21)]
    losses = [float(torch.nn.functional.cross_entropy(logits.double() / t, labels)) for t in tried]
    assert min(range(41), key=losses.__getitem__) == 20
    assert found == pytest.approx(temperature, rel=0.1)


def test_rows_that_are_all_right_or_all_wrong_have_a_temperature_too():
    logits = torch.eye(3).repeat(4, 1) * 5
    labels = torch.arange(3).repeat(4)
    assert fit_temperature(logits, labels) == pytest.approx(BOUNDS[0])
    assert fit_temperature(logits, (labels + 1) % 3) == pytest.approx(BOUNDS[1])


def test_fitted_on_one_half_the_error_of_the_other_is_lower_and_the_labels_are_the_same():
    logits, labels = sharpened(3.0)
    found = calibrate(logits[::2], labels[::2])
    assert found['rows'] == 1000 and found['ece_after'] < found['ece_before']
    other, truth = logits[1::2], labels[1::2]
    before, after = other.softmax(-1), (other / found['temperature']).softmax(-1)
    assert calibration_error(after, truth) < 0.3 * calibration_error(before, truth)
    assert torch.equal(before.argmax(-1), after.argmax(-1))
    torch.testing.assert_close(at_temperature(after, 1 / found['temperature']), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ('sure', 'right', 'expected'),
    [
        ((1.0, 0.95), (45, 50), 0.025),  # the last bin holds those that are certain
        ((0.8, 0.75), (50, 25), 0.025),  # 12 / 15 is the end of a bin, which is in it
        ((0.9, 0.7), (50, 25), 0.15),  # two bins
    ],
)
def test_the_error_is_that_of_the_bins_that_are_told(sure, right, expected):
    probabilities = torch.tensor([[p, 1 - p] for p in sure for _ in range(50)])
    labels = torch.tensor([int(index >= count) for count in right for index in range(50)])
    bins = reliability(probabilities, labels)
    assert len(bins) == (2 if sure == (0.9, 0.7) else 1)
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)
    found = sum(row['rows'] / 100 * abs(row['confidence'] - row['accuracy']) for row in bins)
    assert calibration_error(probabilities, labels) == pytest.approx(found)
