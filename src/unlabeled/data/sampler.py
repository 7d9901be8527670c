"""Which images make which batch, and how batches are read: a function of (seed, position)."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from unlabeled.batch import Batch
from unlabeled.draws import shuffled

Key = tuple[int, int, int]  # index, epoch, step
Bad = list[tuple[int, str]]  # positions of unreadable images, with the reason


class Reads(Protocol):
    """What a loader reads from: keys in, a batch and the unreadable images met out.

    The batch is None if so many images in a row are unreadable that the run has to stop.
    """

    def __getitem__(self, keys: Any, /) -> tuple[Batch | None, Bad]: ...


class Order(Protocol):
    """Images in the order of an epoch: a tensor, or what computes parts when they are asked for."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


@runtime_checkable
class Orders(Protocol):
    """A split that is read in an order of its own: by shard, or without a list of all images."""

    def order(self, batch_size: int, *key: int | str) -> Order:
        """That of an epoch, under a key. Raises ValueError if the batch size does not fit it."""
        ...


class Batches(DistributedSampler):
    """The batches of one process, as lists of keys; incomplete batches are dropped.

    The order of an epoch is a function of (seed, epoch), unless `order` gives another. Every
    global batch is a run of that order, and each process takes a slice of it, in order of rank:
    the number of processes does not change which images meet. (It is a `DistributedSampler` so
    that Lightning does not put its own around it.)

    Args:
        count: images in the training set.
        batch_size: images in a batch of all processes together.
        seed: fixes the order.
        position: how many batches the run has drawn so far, asked whenever iteration starts. An
            iteration gives `len(self)` batches from there on, past the end of the epoch too:
            Lightning stops by itself where a resumed epoch ends.
        order: asked for an epoch's order of images when the epoch begins, and again when a run
            goes on within it: at least `len(self)` batches of indices, or None.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        position: Callable[[], int],
        order: Callable[[int], Order | None] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"data.batch_size={batch_size} cannot be divided among {world} processes: "
                f"choose a multiple of {world}"
            )
        if batch_size > count:
            raise ValueError(
                f"data.batch_size={batch_size} is more than the {count} training images: "
                f"choose data.batch_size={max(world, count - count % world)} or less"
            )
        super().__init__(range(count), num_replicas=world, rank=rank, seed=seed)  # type: ignore
        self.count, self.batch_size, self.world = count, batch_size, world
        self.position, self.order = position, order
        self._part: Iterable[list[Key]] | None = None

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        if self._part is not None:  # one epoch's, for a loader that goes from part to part
            return iter(self._part)
        return chain.from_iterable(self._of_epochs())

    def parts(self) -> Iterator[None]:
        """One iteration in parts: at each stop, `iter(self)` gives the batches of one epoch.

        Nothing of an epoch is known before its part: its order may depend on what is learned
        from the batches before.
        """
        try:
            for part in self._of_epochs():
                self._part = part
                yield
        finally:
            self._part = None

    def _of_epochs(self) -> Iterator[Iterator[list[Key]]]:
        start = self.position()
        end = start + len(self)
        while start < end:
            epoch = start // len(self)
            stop = min(end, (epoch + 1) * len(self))
            yield self._keys(epoch, range(start, stop), self._order_of(epoch))
            start = stop

    def _order_of(self, epoch: int) -> Order:
        order = None if self.order is None else self.order(epoch)
        return shuffled(self.count, self.seed, "order", epoch) if order is None else order

    def _keys(self, epoch: int, steps: range, order: Order) -> Iterator[list[Key]]:
        rows = self.batch_size // self.world
        for step in steps:
            first = step % len(self) * self.batch_size + self.rank * rows
            yield [(index, epoch, step) for index in order[first : first + rows].tolist()]


class Loader(DataLoader):
    """Reads whole batches, in worker processes if there are any.

    Iterating starts nothing before the first batch is asked for: Lightning makes the iterator of
    a resumed run before it knows the position. Nor are batches of an epoch read before those of
    the epoch before it are used up, whatever the number of workers. Random numbers of the process
    are left alone.

    Args:
        reads: gives batches.
        keys: what to ask it for, batch by batch.
        workers: number of worker processes; 0 reads in this one.
        report: is told the unreadable images of each batch, and raises if these are too many.
        persistent: keep the workers for the next iteration.
    """

    def __init__(
        self,
        reads: Reads,
        keys: Iterable[Any],
        *,
        workers: int,
        report: Callable[[Bad], None],
        persistent: bool = True,
    ) -> None:
        data: Any = reads
        super().__init__(
            dataset=data,
            sampler=keys,
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent and workers > 0,
            generator=torch.Generator(),  # otherwise every iteration draws from torch's own
        )
        self.report = report

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        keys: Any = self.sampler
        for _ in keys.parts() if isinstance(keys, Batches) else (None,):
            for batch, bad in super().__iter__():
                self.report(bad)  # raises where batch is None
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the trainer's. Lightning asks to tell that it may resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _same(batch: Any) -> Any:
    return batch
