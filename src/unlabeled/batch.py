"""What travels from the disk to the loss."""

from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB
T = TypeVar("T")


class Batch(TypedDict, total=False):
    """One batch. `data` writes the first group on the CPU, `augment` the second on the device.

    `target` is a tensor of any shape or a dictionary of them (classes, colour codes, masks).
    """

    crops: list[Tensor]  # one (B, 3, S, S) uint8 per crop; video: (B, T, 3, S, S)
    audio: Tensor  # (B, samples) float32 in [-1, 1]
    frames: Tensor  # (B, T) int64, which pictures of its recording a clip shows
    index: Tensor  # (B,) int64, position in the training set
    group: Tensor  # (B,) int64, the video that a recording was cut from, where that is known
    label: Tensor  # (B,) int64, never read by a self-supervised loss
    tags: Tensor  # (B, M) int64, all the labels of an image that has several; -1 fills up
    step: int  # how many batches the run has drawn before this one: the key of randomness
    task: str  # which of a multi-task method's tasks made this batch
    tasks: dict[str, "Batch"]  # or what each of them made: crops, then views, mask and target

    views: list[Tensor]  # what the loss sees: float32, normalised, any trailing shape
    mask: Tensor  # 1 where the loss looks
    target: Tensor | dict[str, Tensor]  # the pretext answer, if there is one


def sources(batch: Batch) -> Tensor:
    """(B,) int64: equal where samples come from one video; each its own where that is not known."""
    return batch.get("group", batch["index"])


def first(batch: Batch, count: int) -> Batch:
    """The first `count` samples of a batch; what is not of samples stays as it is."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:count]
        if isinstance(value, list):
            return [part(each) for each in value]
        if isinstance(value, dict):
            return {name: part(each) for name, each in value.items()}
        return value

    return part(batch)


def normalize(x: Tensor) -> Tensor:
    """Images (..., 3, H, W), floats in [0, 1] or uint8, to zero mean and unit variance.

    Every backbone takes images normalised like this; one that was trained otherwise converts
    inside.
    """
    x = x if x.is_floating_point() else x.float() / 255
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def denormalize(x: Tensor) -> Tensor:
    """The inverse of `normalize`: floats in [0, 1] again."""
    return x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)


def taken_by(loss: Callable[[Batch], T], batch: Batch) -> T:
    """What a loss makes of an augmented batch.

    Raises:
        ValueError: it takes another number of views than there are, or something of a batch that
            this one has not: another method's augmentation was chosen.
    """
    try:
        return loss(batch)
    except (ValueError, KeyError) as error:
        if isinstance(error, KeyError) and str(error).strip("'") in Batch.__annotations__:
            said = f"does not give the {error} that the method needs"
        elif "values to unpack" in str(error):
            said = f"gives another number of views than the method takes ({error})"
        else:
            raise
        raise ValueError(
            f"the augmentation {said}: choose method.augment and decode as the method's file in "
            "conf/method does"
        ) from error
