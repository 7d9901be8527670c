"""Crops for several tasks: which of them a batch is for, and who cuts it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from torch import Tensor

from unlabeled.batch import Batch
from unlabeled.data.decode import Decode
from unlabeled.draws import Draws

Cut = list[Tensor] | Batch  # what a decode makes: crops, or several entries of a batch


class Tasks:
    """A decode for each task of a multi-task method.

    Draws have the same keys for all tasks: equal decodes cut equal crops.

    Args:
        tasks: decodes, by the method's names of its tasks.
        schedule: "round_robin": whole batches take turns, in the order of `tasks`, by the number
            of batches drawn before: all processes agree, and a run that goes on does too.
            "summed": every batch has the crops of every task.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Decode],
        schedule: Literal["round_robin", "summed"] = "round_robin",
    ) -> None:
        if not tasks:
            raise ValueError("tasks is empty: name at least one, with its decode")
        if schedule not in ("round_robin", "summed"):
            raise ValueError(f"schedule must be round_robin or summed, got {schedule!r}")
        self.tasks, self.schedule = dict(tasks.items()), schedule

    def __call__(self, image: Tensor, *key: int | str) -> list[Tensor]:
        """The crops of all tasks, one after the other."""
        return [crop for decode in self.tasks.values() for crop in decode(image, *key)]

    def batched(self, images: Tensor, draws: Draws) -> list[Tensor]:
        """The crops of all tasks, one after the other."""
        return [x for decode in self.tasks.values() for x in decode.batched(images, draws)]

    def __repr__(self) -> str:
        return f"Tasks({self.tasks!r}, schedule={self.schedule!r})"


def by_task(decode: Decode, step: int | None = None) -> Mapping[str, Decode]:
    """Tasks with their decodes; one without a name where there are no tasks.

    Args:
        decode: of a data module.
        step: only those of the batch before which so many were drawn.
    """
    if not isinstance(decode, Tasks):
        return {"": decode}
    if step is None or decode.schedule == "summed":
        return decode.tasks
    name = list(decode.tasks)[step % len(decode.tasks)]
    return {name: decode.tasks[name]}


def filled(batch: Batch, cut: Mapping[str, Cut]) -> Batch:
    """A batch with what was cut for each task: `task` names one, several are in `tasks`."""
    parts = {
        name: each if isinstance(each, dict) else Batch(crops=each) for name, each in cut.items()
    }
    (name, first), *others = parts.items()
    batch = {**batch, **first}
    if others:
        batch["tasks"] = parts
    elif name:
        batch["task"] = name
    return batch


def in_turn(decode: Decode, read: Callable[[Decode], Iterator[Batch]]) -> Iterator[Batch]:
    """Every batch that `read` gives once for each task."""
    decodes = by_task(decode)
    for batches in zip(*(read(each) for each in decodes.values()), strict=True):
        for task, batch in zip(decodes, batches, strict=True):
            yield filled(batch, {task: batch["crops"]})  # type: ignore[typeddict-item]
