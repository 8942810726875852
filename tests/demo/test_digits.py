"""The data, the decoder and the reward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tolerance import CLASSIFIER_ACCURACY


def test_split(digits: Any) -> None:
    data = digits.load_digits()
    assert data.train_images.shape == (1437, 1, 8, 8) and data.train_labels.shape == (1437,)
    assert data.test_images.shape == (360, 1, 8, 8) and data.test_labels.shape == (360,)
    images = torch.cat([data.train_images, data.test_images])
    assert images.dtype == torch.float32 and (images.min(), images.max()) == (-1.0, 1.0)
    assert ((images + 1) * 8 == ((images + 1) * 8).round()).all(), "17 grey levels, exactly"
    assert data.train_labels.bincount().tolist() != [0] * 10
    assert (data.test_labels.bincount(minlength=10) - 36).abs().max() <= 2, "each class a tenth of the test set"


def test_split_is_a_partition_and_always_the_same(digits: Any) -> None:
    from sklearn.datasets import load_digits

    data = digits.load_digits()
    everything = torch.from_numpy(load_digits().images).float().flatten(1)
    mine = (torch.cat([data.train_images, data.test_images]).flatten(1) + 1) * 8
    assert torch.equal(mine.sum(0), everything.sum(0))
    digits.load_digits.cache_clear()
    again = digits.load_digits()
    assert torch.equal(again.test_images, data.test_images) and torch.equal(again.test_labels, data.test_labels)


def test_decode(digits: Any) -> None:
    clean = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 7.0]).repeat_interleave(64).reshape(6, 1, 8, 8)
    images = digits.decode(clean)
    assert images.dtype == torch.uint8 and images[:, 0, 0, 0].tolist() == [0, 0, 128, 191, 255, 255]
    assert digits.decode(clean[:0]).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match=r"clean: wanted \[M, 1, 8, 8\], got \[6, 64\]"):
        digits.decode(clean.flatten(1))
    with pytest.raises(ValueError, match="not finite"):
        digits.decode(torch.full((1, 1, 8, 8), float("nan")))


def test_classifier_accuracy(digits: Any) -> None:
    data, classifier = digits.load_digits(), digits.classifier()
    accuracy = (classifier.predict(digits.decode(data.test_images)) == data.test_labels).double().mean()
    assert accuracy > CLASSIFIER_ACCURACY
    assert accuracy == pytest.approx(classifier.test_accuracy)
    assert torch.allclose(classifier.log_probs(digits.decode(data.test_images)).exp().sum(1), torch.ones(360))


def test_reward_is_the_margin(digits: Any) -> None:
    data = digits.load_digits()
    images, labels = digits.decode(data.test_images), data.test_labels
    reward = digits.DigitReward(list(range(10)))
    rewards = reward(images, SimpleNamespace(prompt_index=labels))
    log_probs = digits.classifier().log_probs(images)
    for i in range(0, 360, 40):
        others = [float(log_probs[i, c]) for c in range(10) if c != int(labels[i])]
        assert float(rewards[i]) == pytest.approx(float(log_probs[i, labels[i]]) - max(others))
    assert torch.equal(rewards > 0, log_probs.argmax(1) == labels), "positive means recognised"
    wrong = reward(images, SimpleNamespace(prompt_index=(labels + 1) % 10))
    assert (wrong < 0).double().mean() > CLASSIFIER_ACCURACY, "another digit scores below zero"


@pytest.mark.parametrize("prompts", [[], [10], [-1], [3, "4"], [2.0]])
def test_prompts_that_are_no_digits(digits: Any, prompts: list[Any]) -> None:
    with pytest.raises(ValueError, match="prompts: wanted one or more digits"):
        digits.DigitReward(prompts)


def test_reward_refuses_what_it_cannot_score(digits: Any) -> None:
    reward, images = digits.DigitReward([3, 8]), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    info = SimpleNamespace(prompt_index=torch.tensor([0, 1]))
    assert reward(images, info).shape == (2,)
    assert reward(images[:0], SimpleNamespace(prompt_index=torch.zeros(0))).shape == (0,)
    with pytest.raises(ValueError, match="images: wanted uint8"):
        reward(images.float(), info)
    with pytest.raises(ValueError, match=r"images: wanted uint8 \[M, 1, 8, 8\]"):
        reward(images[:, 0], info)
    with pytest.raises(ValueError, match=r"info.prompt_index: wanted one index per image, \[2\], got \[1\]"):
        reward(images, SimpleNamespace(prompt_index=[0]))
    with pytest.raises(ValueError, match=r"info.prompt_index: wanted 0..1, got 0..2"):
        reward(images, SimpleNamespace(prompt_index=[0, 2]))
