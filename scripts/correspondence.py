"""How well a run of AVC tells which sounds belong to pictures, on held-out recordings.

    python scripts/correspondence.py RUN
    python scripts/correspondence.py RUN --pairs 4000 --data clips

Every held-out recording is met equally often, each time at a random moment: once its picture with
the second of sound about it, once with the sound of a recording of another video. Half of the
pairs belong together, chance is 50 %. Two intervals of 95 % are given: over pairs, which holds for
these recordings, and over recordings, which is wider where they differ (bootstrap).
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from torch import Tensor

from unlabeled.batch import sources
from unlabeled.evaluate.intervals import bootstrap
from unlabeled.parts.sources import another


def answers(method: Any, data: Any, rounds: int) -> Tensor:
    """(rounds, recordings, 2): whether each answer was right, to its own sound and another's."""
    count = data.size("test")
    if count < 2:
        raise ValueError(f"another recording's sound needs two, and there are {count} to test on")
    size = min(count, data.batch_size)
    found = []
    for turn in track(range(rounds), description="pairs", console=Console(stderr=True)):
        parts = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
        seen, heard, video = [], [], []
        for part, batch in enumerate(data.cut("test", parts, data.decode, "pairs", turn)):
            video.append(sources(batch))
            views = method.augmented(batch, turn * len(parts) + part)["views"]
            with torch.inference_mode():
                seen.append(method.backbone(views[0]))
                heard.append(method.listen(views[1]))
        v, a = torch.cat(seen), torch.cat(heard)
        own = torch.cat(video)
        start = torch.arange(count) - 1 - turn % (count - 1)  # every other recording in turn
        place, there = another(own, own, start)
        if not there.all():
            raise ValueError("another video's sound needs two videos, and there is one to test on")
        with torch.inference_mode():
            right = method.logits(v, a), method.logits(v, a[place])
        found.append(torch.stack([x.argmax(1) == y for x, y in zip(right, (1, 0), strict=True)], 1))
    return torch.stack(found).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=4000, help="at least so many")
    parser.add_argument("--data", help="the folder of the recordings, if not the run's")
    args = parser.parse_args()
    try:
        config = OmegaConf.load(args.run / ".hydra/config.yaml")
        if args.data is not None:
            config.data.root = args.data
        method, data = instantiate(config.method), instantiate(config.data)
        if not hasattr(method, "localise"):
            raise ValueError(f"{args.run} is no run of method=avc")
        data.setup("test")
        saved = torch.load(args.run / "checkpoints/last.ckpt", weights_only=True)
        method.load_state_dict(saved["state_dict"])
        method.eval()
        method.seed = data.seed
        count = data.size("test")
        right = answers(method, data, math.ceil(args.pairs / (2 * count)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    pairs = right.numel()
    mean = right.mean().item()
    half = 1.96 * math.sqrt(mean * (1 - mean) / pairs)
    ((low, high),) = bootstrap(right.mean((0, 2))[:, None], "correspondence")
    found = {
        "pairs": pairs,
        "recordings": count,
        "correspondence": round(100 * mean, 2),
        "own_sound": round(100 * right[..., 0].mean().item(), 2),
        "another's": round(100 * right[..., 1].mean().item(), 2),
        "over_pairs": [round(100 * (mean - half), 2), round(100 * (mean + half), 2)],
        "over_recordings": [round(100 * low, 2), round(100 * high, 2)],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
