"""Real data, a real reward and a real flow model, small enough for two CPU cores.

The data are the UCI handwritten digits that ship with scikit-learn: 1,797 grey images of 8x8 pixels with 17 grey levels. A
prompt is a digit 0..9. Everything here is deterministic. scikit-learn is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .digits_model import NULL, PROMPTS, Embeddings, load_model, read_record, save_checkpoint, save_pretrained

__all__ = [
    "NULL",
    "PROMPTS",
    "SHAPE",
    "Classifier",
    "DigitReward",
    "Digits",
    "Embeddings",
    "classifier",
    "decode",
    "load_digits",
    "load_model",
    "prompt_labels",
    "read_record",
    "save_checkpoint",
    "save_pretrained",
]

SHAPE = (1, 8, 8)  # channels, height, width of one sample
TEST_IMAGES = 360  # 20 % of the 1,797
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images float32 [N, 1, 8, 8] in [-1, 1] and labels int64 [N], split by class proportions."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@cache
def load_digits() -> Digits:
    """The 1,797 digits: 1,437 to train on and 360 to test on, always the same ones.

    Pixel values 0..16 are mapped to [-1, 1]: black ground is -1, full ink is 1.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    train, test, train_labels, test_labels = train_test_split(
        data.images, data.target, test_size=TEST_IMAGES, stratify=data.target, random_state=SPLIT_SEED
    )

    def images(x: Any) -> Tensor:
        return torch.from_numpy(x).float()[:, None] / 8.0 - 1.0

    def labels(y: Any) -> Tensor:
        return torch.from_numpy(y).long()

    return Digits(images(train), labels(train_labels), images(test), labels(test_labels))


def decode(clean: Tensor, info: Any = None) -> Tensor:
    """Clean predictions [M, 1, 8, 8] around [-1, 1] -> 8-bit images uint8 [M, 1, 8, 8] on the CPU, clamped, to nearest.

    `info` (the engine's row information) is not used. A value that is not finite is an error: it would become a grey level.
    """
    if clean.ndim != 4 or tuple(clean.shape[1:]) != SHAPE:
        raise ValueError(f"clean: wanted [M, 1, 8, 8], got {list(clean.shape)}")
    if not bool(torch.isfinite(clean).all()):
        raise ValueError("clean: holds values that are not finite; check the model and the schedule before decoding")
    return ((clean.float() + 1.0) * 127.5).clamp(0.0, 255.0).round().to("cpu", torch.uint8)


class Classifier:
    """A digit classifier fitted on the real training images: RBF features (Nystroem) and multinomial logistic regression.

    Far from every digit the features vanish and the class probabilities approach the prior, so grey or noisy pictures
    score low instead of at random. The constants are the best of a 5-fold cross-validation on the training images (98.8 %).
    """

    def __init__(
        self, digits: Digits, *, components: int = 1000, gamma: float = 0.4, inverse_penalty: float = 100.0
    ) -> None:
        from sklearn.kernel_approximation import Nystroem
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self.pipeline = make_pipeline(
            Nystroem(gamma=gamma, n_components=components, random_state=0),
            LogisticRegression(C=inverse_penalty, max_iter=2000),
        )
        with _one_thread():
            self.pipeline.fit(_features(decode(digits.train_images)), digits.train_labels.numpy())
        self.test_accuracy = float((self.predict(decode(digits.test_images)) == digits.test_labels).double().mean())

    def log_probs(self, images: Tensor) -> Tensor:
        """Log-probability in nats of each class: uint8 images [M, 1, 8, 8] -> float32 [M, 10]."""
        _check_images(images)
        if images.shape[0] == 0:
            return torch.empty(0, 10)
        with _one_thread():
            return torch.from_numpy(self.pipeline.predict_log_proba(_features(images))).float()

    def predict(self, images: Tensor) -> Tensor:
        """The most likely class: uint8 images [M, 1, 8, 8] -> int64 [M]."""
        return self.log_probs(images).argmax(dim=1)


@cache
def classifier() -> Classifier:
    """The classifier of the reward, fitted once per process (about half a second)."""
    return Classifier(load_digits())


class DigitReward:
    """Reward of an image: log-probability of the digit that was asked for, less that of the best other digit, in nats.

    Above 0 the classifier recognises the image as the wanted digit; unlike a log-probability the margin does not saturate
    when all samples are recognised. `prompts` are the digits 0..9, one per prompt of the rollout.
    """

    name = "classifier margin of the wanted digit (nats)"

    def __init__(self, prompts: Sequence[int]) -> None:
        wrong = [p for p in prompts if not (isinstance(p, int) and 0 <= p < PROMPTS)]
        if wrong or not len(prompts):
            raise ValueError(f"prompts: wanted one or more digits 0..9, got {wrong or list(prompts)}")
        self.prompts = torch.tensor(list(prompts), dtype=torch.int64)
        self.classifier = classifier()

    def __call__(self, images: Tensor, info: Any) -> Tensor:
        """uint8 images [M, 1, 8, 8] and info.prompt_index [M] -> float32 [M]."""
        index = torch.as_tensor(info.prompt_index, dtype=torch.int64).cpu()
        if index.shape != (images.shape[0],):
            raise ValueError(
                f"info.prompt_index: wanted one index per image, [{images.shape[0]}], got {list(index.shape)}"
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self.prompts):
            raise ValueError(
                f"info.prompt_index: wanted 0..{len(self.prompts) - 1}, got {int(index.min())}..{int(index.max())}"
            )
        log_probs, wanted = self.classifier.log_probs(images), self.prompts[index][:, None]
        others = log_probs.scatter(1, wanted, -torch.inf).amax(dim=1)
        return log_probs.gather(1, wanted)[:, 0] - others


def prompt_labels(prompts: Sequence[int]) -> list[str]:
    """The prompts in words, for pictures and tables."""
    return [f"digit {p}" for p in prompts]


def _features(images: Tensor) -> Any:
    return images.reshape(images.shape[0], -1).double().numpy() / 255.0


def _one_thread() -> Any:
    """Keeps BLAS to one thread: matrices this small gain nothing from more, and lose seconds where the cores are shared."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != SHAPE:
        raise ValueError(
            f"images: wanted uint8 [M, 1, 8, 8] as `decode` gives them, got {images.dtype} {list(images.shape)}"
        )
    if images.device.type != "cpu":
        raise ValueError(
            f"images: wanted on the CPU, where the classifier runs, got {images.device}; move them with .cpu()"
        )
