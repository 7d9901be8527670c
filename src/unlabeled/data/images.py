"""The data module of images: any layout, from files or from memory."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
from torch import Tensor

from unlabeled.batch import Batch
from unlabeled.data.annotated import Annotations
from unlabeled.data.decode import Decode
from unlabeled.data.encoded import Encoded, EncodedRows, cropped
from unlabeled.data.lasting import unseen
from unlabeled.data.layouts import Layout
from unlabeled.data.reading import MemoryRows, TrainingRows, answers
from unlabeled.data.sampler import Batches, Loader, Order
from unlabeled.data.splits import digest, lies_in, parted
from unlabeled.data.store import Store, check, cores
from unlabeled.data.tasks import Tasks, by_task, filled, in_turn
from unlabeled.draws import Draws

Side = Literal["train", "test"]


class Images(Annotations, pl.LightningDataModule):
    """Images and, where the layout knows them, labels.

    In the `memory` tier all images are one uint8 tensor and crops are cut on the device; in the
    `folder` tier workers decode and crop files; in the `gpu` tier they read the training images'
    files only, which the device decodes (nvJPEG) and crops. Evaluations decode in workers there.

    Args:
        root: the folder of the data set.
        layout: reads the root: see `unlabeled.data.layouts`.
        decode: random crops for training; of each task of a multi-task method, see `Tasks`.
        eval_decode: one fixed crop for evaluations.
        batch_size: images of one forward over all processes.
        limit: use only so many training images, balanced over classes, fixed by the seed.
        workers: processes that decode; None: none for memory, else one per core, at most 8.
        tier: "memory", "folder", "gpu", or "auto": memory where the layout gives arrays.
        val_share: share of the training images set aside for choosing hyper-parameters.
        max_unreadable: share of a split's images that may be unreadable before a run stops.
        seed: of order, crops, limit and val_share.
        size: side of the images in memory, in pixels; None: as they are.
    """

    def __init__(
        self,
        *,
        root: str,
        layout: Layout,
        decode: Decode | Mapping[str, Decode],
        eval_decode: Decode,
        batch_size: int = 256,
        limit: int | None = None,
        workers: int | None = None,
        tier: Literal["auto", "memory", "folder", "gpu"] = "auto",
        val_share: float = 0.1,
        max_unreadable: float = 0.01,
        seed: int = 0,
        size: int | None = None,
    ) -> None:
        super().__init__()
        check(tier, batch_size=batch_size, limit=limit, workers=workers, size=size)
        for name, share in (("val_share", val_share), ("max_unreadable", max_unreadable)):
            if not 0 <= share < 1:
                raise ValueError(f"data.{name} must be in [0, 1), got {share}")
        self.root = Path(root).expanduser()
        self.decode: Decode = Tasks(tasks=decode) if isinstance(decode, Mapping) else decode
        self.eval_decode = eval_decode
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.tier, self.side, self.val_share = tier, size, val_share
        cut = {"crops", "task"} if isinstance(self.decode, Tasks) else {"crops"}
        self.gives = frozenset({"index", *cut})  # from `setup` on with `answers`
        self.count = 0
        self.classes: list[str] = []
        self._store: Store | None = None
        kept = partial(Store, self.root, layout, limit=limit, tier=tier, size=size, seed=seed)
        self._open = partial(kept, max_unreadable=max_unreadable)
        self._passes = 0  # over the training images, where no trainer counts

    def prepare_data(self) -> None:
        """Reads the root in one process per machine first: it may download, or fill the cache."""
        self._read()

    def setup(self, stage: str | None = None) -> None:
        """Reads the root once.

        Raises:
            ValueError: the root does not hold what the layout expects, or fewer images than
                `limit` or, to train (stage "fit"), than a batch.
        """
        store = self._read()
        if stage == "fit":
            self._batches()  # raises if a batch cannot be filled
            store.order(self.batch_size, self.seed, 0)
        if store.in_memory("train"):
            store.pixels("train")

    def train_dataloader(self) -> Loader:
        """Batches of this process, in an order fixed by the seed and the epoch."""
        store = self._read()
        split, unreadable = store.split("train"), store.unreadable["train"]
        if store.in_memory("train"):
            rows = MemoryRows(store.pixels("train"), split, unreadable.found)
        else:
            reads = EncodedRows if self.tier == "gpu" else TrainingRows
            rows = reads(split, self.decode, self.seed, unreadable.allowed + 1)
        return Loader(rows, self._batches(), workers=self._workers(), report=unreadable)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Cuts the crops of a training batch of whole images, on its device."""
        store = self._read()
        if isinstance(batch.get("crops"), Encoded):
            batch, bad = cropped(batch, self.decode, batch["index"].device)  # type: ignore
            store.unreadable["train"](bad)
            return batch
        if "step" not in batch or not store.in_memory("train"):
            return batch
        (images,) = batch["crops"]  # type: ignore[typeddict-item]
        draws = Draws(self.seed, "crop", batch["step"], rows=len(images), **self._place())
        decodes = by_task(self.decode, batch["step"])
        return filled(batch, {task: d.batched(images, draws) for task, d in decodes.items()})

    def scan(
        self, split: Side, start: int = 0, stop: int | None = None, batch_size: int = 256
    ) -> Iterator[Batch]:
        """Every image from `start` to `stop` once, in the order of the split, cut to evaluate."""
        store = self._read()
        count = len(store.split(split))
        stop = count if stop is None else min(stop, count)
        parts = [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
        workers = self._workers() if len(parts) > 1 else 0  # one part is read sooner than forked
        return store.scan(split, parts, self.eval_decode, min(workers, len(parts)))

    def cut(
        self, split: Side, parts: Sequence[Sequence[int]], decode: Decode, *key: int | str
    ) -> Iterator[Batch]:
        """Batches of the images at given positions, cut by any decode: to train an evaluation.

        Args:
            split: "train" or "test".
            parts: positions of every batch.
            decode: how each image is cut.
            key: fixes what is random in it, e.g. ("finetune", seed, epoch); the same for every
                number of workers, but not across tiers.
        """
        workers = min(self._workers(), max(0, len(parts) - 1))  # one is read sooner than forked
        return self._read().scan(split, parts, decode, workers, key)

    def unseen(self, count: int) -> Iterator[Batch]:
        """Test images cut as training cuts them, this process's share of full batches.

        Which images, balanced over classes and in random order, and their crops are fixed by
        the seed. Where there are several tasks, every batch comes once for each.

        Args:
            count: about how many, at least one batch; all there are if these are fewer; none if
                all are too short for what training cuts.
        """
        chosen = unseen(self._read().split("test"), count, self.decode, self.seed)
        if not len(chosen):
            return iter(())  # all are too short
        rank, world = self._place().values()
        rows = max(1, min(self.batch_size, len(chosen)) // world)
        wholes = chosen[: len(chosen) // (rows * world) * rows * world].view(-1, world, rows)
        parts = wholes[:, rank].tolist()
        return in_turn(self.decode, lambda decode: self.cut("test", parts, decode, "plain"))

    def has(self, split: Side) -> bool:
        """Whether there is such a split."""
        return split in self._read().splits

    def size(self, split: Side) -> int:
        """Number of its images."""
        return len(self._read().split(split))

    def path(self, split: Side, position: int) -> str:
        """What an image's file is called, relative to the root."""
        return self._read().split(split).name(position)

    def labels(self, split: Side) -> Tensor | None:
        """(N,) int64 in the order of `scan`, or None if there are none."""
        return self._read().split(split).labels

    def selection(self) -> tuple[Tensor, Tensor]:
        """Positions of training images to (fit heads on, choose hyper-parameters on)."""
        split = self._read().split("train")
        return parted(split, self.val_share, self.seed, "selection")

    def split_hash(self) -> str:
        """Names the selection: training images and which of them are for what."""
        parts = [x.numpy().tobytes() for x in self.selection()]
        return digest([self._read().split("train").identity().encode(), *parts], None, ())

    def fingerprint(self, split: Side) -> str:
        """Names what `scan` gives: the images, their order, their labels and their crop."""
        tier = f"memory {self.side}" if self._read().in_memory(split) else "folder"
        images = self._read().split(split)
        said = f"{tier} {self.eval_decode!r}{lies_in(images)}".encode()
        return digest([images.identity().encode(), said], None, ())

    def thumbnail(self, split: Side, position: int) -> Tensor:
        """An image (3, h, w) uint8 as evaluations see it."""
        batch = next(iter(self.scan(split, position, position + 1)))
        return batch["crops"][0][0]  # type: ignore[typeddict-item]

    @property
    def unreadable(self) -> dict[str, dict[int, str]]:
        """Split -> position -> reason, of the images that could not be read so far."""
        return {side: dict(met.found) for side, met in self._read().unreadable.items()}

    def _read(self) -> Store:
        if self._store is None:
            self._store = self._open()
            train = self._store.split("train")
            self.count, self.classes = len(train), list(train.classes)
            self.gives |= answers(train)
        return self._store

    def _batches(self) -> Batches:
        order = (self.count, self.batch_size, self.seed)
        return Batches(*order, position=self._position, order=self._begin, **self._place())

    def _begin(self, epoch: int) -> Order | None:
        """Tells what is trained that an epoch of these data begins: it may choose the order."""
        method = None if self.trainer is None else self.trainer.lightning_module
        begin = getattr(method, "begin_epoch", None)
        order = None if begin is None else begin(epoch)
        return self._read().order(self.batch_size, self.seed, epoch) if order is None else order

    def _position(self) -> int:
        """Batches drawn so far: the trainer counts them, and its checkpoints carry the count."""
        if self.trainer is not None:
            return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore
        self._passes += 1
        return (self._passes - 1) * (self.count // self.batch_size)

    def _place(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world": 1}
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size}

    def _workers(self) -> int:
        if self.workers is not None or self._read().in_memory("train"):
            return self.workers or 0
        here = 1 if self.trainer is None else max(1, self.trainer.num_devices)
        return max(1, min(cores() // here, 8))
