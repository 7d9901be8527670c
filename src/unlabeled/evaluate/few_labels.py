"""Which training images' labels an evaluation may read."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlabeled.draws import subset


def labelled(data: Any, share: float, list: str | None, seed: int) -> Tensor:
    """Positions of training images, sorted: those on a list, or a share, balanced over classes.

    Args:
        data: the data module.
        share: of the training images, where there is no list.
        list: a text file of file names, or paths, one a line.
        seed: fixes the share.

    Raises:
        ValueError: the list names an image that is not there, one of several, or none.
    """
    n, labels = data.size("train"), data.labels("train")
    if list is None:
        if share == 1:
            return torch.arange(n)
        return subset(labels.tolist(), n, max(1, round(share * n)), seed, "labelled")
    lines = Path(list).expanduser().read_text().splitlines()
    wanted = [name for line in lines if (name := line.strip())]
    paths = {data.path("train", i): i for i in range(n)}
    place: dict[str, int] = {}
    several: set[str] = set()  # file names that folders share
    for path, i in paths.items():
        name = path.rpartition("/")[2]
        if place.setdefault(name, i) != i:
            several.add(name)
    place |= paths
    if vague := [name for name in wanted if name in several and name not in paths]:
        raise ValueError(
            f"{list}: {len(vague)} of {len(wanted)} names are of several training images, e.g. "
            f"{vague[0]}: write paths, such as {data.path('train', 0)}"
        )
    if missing := [name for name in wanted if name not in place]:
        raise ValueError(
            f"{list}: {len(missing)} of {len(wanted)} images are not among the training "
            f"images, e.g. {missing[0]}; these are called {data.path('train', 0)} and so on"
        )
    if not wanted:
        raise ValueError(f"{list} names no image")
    return torch.tensor(sorted({place[name] for name in wanted}))
