"""The order in which an epoch meets images that lie in shards: near ones stay near, none twice."""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from unlabeled.draws import Key, seed_of, shuffled


class BufferedOrder:
    """Shards in random order, their images shuffled as by a buffer; a function of its arguments.

    The images of all shards, in the epoch's order of shards, are one sequence. It is divided into
    `lanes` equal runs, each of which gives an equal, contiguous share of every batch: where the
    number of nodes divides `lanes`, a node reads its own lanes only, so no other node's shards.
    Within a lane, images are shuffled inside windows, and again inside windows that lie half a
    window further: each moves by at most one and a half windows.

    No list of all images is made: any part costs the windows that it touches, also where a run
    goes on in the middle of an epoch.

    Args:
        counts: (S,) images of each shard; image i of the data set is the i-th of all shards in
            the order given here.
        batch_size: images of a batch of all processes.
        buffer: images of the windows of all lanes together.
        lanes: see above; must divide `batch_size`.
        key: fixes what is random, e.g. (seed, epoch).
    """

    def __init__(
        self, counts: np.ndarray, batch_size: int, buffer: int, lanes: int, *key: int | str
    ) -> None:
        if batch_size % lanes:
            raise ValueError(
                f"data.layout.lanes={lanes} must divide data.batch_size={batch_size}: each lane "
                "gives an equal share of every batch"
            )
        self.key: Key = key
        self.batch_size, self.lanes, self.window = batch_size, lanes, max(1, buffer // lanes)
        shards = shuffled(len(counts), *key, "shards").numpy()
        starts = np.cumsum(counts) - counts
        self._ends = np.cumsum(counts[shards])
        self._shift = starts[shards] - (self._ends - counts[shards])  # from the sequence to images
        self._count = int(counts.sum())
        self.lane = self._count // lanes  # its length
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Images of full batches; the others sit this epoch out."""
        return self._count // self.batch_size * self.batch_size

    def __getitem__(self, part: slice) -> Tensor:
        """(n,) int64 images at a run of places."""
        first, last, _ = part.indices(len(self))
        place = np.arange(first, last)
        rows = self.batch_size // self.lanes
        step, row = np.divmod(place, self.batch_size)
        lane, row = np.divmod(row, rows)
        inside = step * rows + row
        for half in (1, 0):  # the second shuffle is undone first
            inside = self._shuffled(lane, inside, half)
        place = lane * self.lane + inside
        return torch.from_numpy(place + self._shift[np.searchsorted(self._ends, place, "right")])

    def _shuffled(self, lane: np.ndarray, inside: np.ndarray, half: int) -> np.ndarray:
        """What stands at places inside lanes after one shuffle of their windows."""
        offset = self.window // 2 * half
        out = np.empty_like(inside)
        window = (inside + offset) // self.window
        for k, w in np.unique(np.stack([lane, window]), axis=1).T.tolist():
            here = (lane == k) & (window == w)
            low = max(0, w * self.window - offset)
            out[here] = low + self._permutation(k, w, half)[inside[here] - low]
        return out

    def _permutation(self, lane: int, window: int, half: int) -> np.ndarray:
        name = (lane, window, half)
        if name not in self._kept:
            offset = self.window // 2 * half
            low, high = window * self.window - offset, (window + 1) * self.window - offset
            size = min(high, self.lane) - max(0, low)
            generator = torch.Generator().manual_seed(seed_of(*self.key, "window", *name))
            dtype = torch.int32 if size < 1 << 31 else torch.int64
            order = torch.randperm(size, generator=generator, dtype=dtype)
            self._kept[name] = order.numpy()
            if len(self._kept) > 5 * self.lanes:  # three are in use in a lane at a time
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        return self._kept[name]
