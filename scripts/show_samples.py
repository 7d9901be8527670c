"""Puts the pictures of several runs beside one another: one image, a row for each held-out picture.

    python scripts/show_samples.py OUT.png RUN [RUN ...]

Columns are those of each run's report (figures/samples.npz) in order; one whose pictures have been
shown already, such as the input and the truth of runs on the same data, is shown once, the truth
last. So the classes of a colourisation stand beside the grey mean of its regression:

    unlabeled experiment=cifar10/colorization hydra.run.dir=outputs/classes
    unlabeled experiment=cifar10/colorization method.objective=regression hydra.run.dir=outputs/mean
    python scripts/show_samples.py colors.png outputs/classes outputs/mean
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

LAST = "truth"


def columns(runs: list[Path]) -> dict[str, np.ndarray]:
    """Pictures (B, h, w, 3) uint8 by title, each once; titles of further runs name them."""
    found: dict[str, np.ndarray] = {}
    for run in runs:
        with np.load(run / "figures/samples.npz", allow_pickle=False) as file:
            for i, title in enumerate(file["titles"].tolist()):
                new = file[f"column{i}"]
                if not any(np.array_equal(new, old) for old in found.values()):
                    found[title if title not in found else f"{title} ({run.name})"] = new
    if LAST in found:
        found[LAST] = found.pop(LAST)
    shapes = {x.shape for x in found.values()}
    if len(shapes) != 1:
        raise ValueError(f"the runs' pictures differ in number or size: {sorted(shapes)}")
    return found


def sheet(pictures: list[np.ndarray], zoom: int, gap: int = 4) -> Image.Image:
    """One white sheet with a column for each of the pictures (B, h, w, 3)."""
    rows = np.stack(pictures, 1).repeat(zoom, 2).repeat(zoom, 3)  # B columns h w 3
    padded = np.pad(rows, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    b, n, h, w, _ = padded.shape
    whole = padded.transpose(0, 2, 1, 3, 4).reshape(b * h, n * w, 3)
    return Image.fromarray(whole[:-gap, :-gap])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--zoom", type=int, default=3)
    args = parser.parse_args()
    found = columns(args.runs)
    sheet(list(found.values()), args.zoom).save(args.out)
    print(f"{args.out}, from left to right: {', '.join(found)}")


if __name__ == "__main__":
    main()
