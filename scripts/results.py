"""The README's table of methods: every method for the same time on the same small ResNet.

    python scripts/results.py --seconds 120 --set data.limit=10000

Each method first runs a few steps, to find how many updates fit into the time, and then trains for
as many with its own schedule. A run whose scores exist is not repeated, so the table continues
where it stopped. `--table` prints what there is and runs nothing.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

METHODS = (
    "rotation",
    "jigsaw",
    "simclr",
    "moco_v2",
    "byol",
    "barlow_twins",
    "pirl",
    "swav",
    "clusterfit",
    "supervised",
)


def unlabeled(*overrides: str) -> None:
    """One run, in a process of its own."""
    subprocess.run([sys.executable, "-m", "unlabeled.train", *overrides], check=True)


def speed(run: Path) -> float:
    """Median images per second of a run."""
    with (run / "metrics.csv").open(newline="") as file:
        cells = [row.get("perf/images_per_second") for row in csv.DictReader(file)]
    return statistics.median(float(cell) for cell in cells if cell)


def train(method: str, out: Path, seconds: float, batch: int, settings: list[str]) -> None:
    """Trains and evaluates one method, if its scores are not there yet."""
    if (out / method / "scores.json").exists():
        return
    common = [f"experiment=cifar10/{method}", f"data.batch_size={batch}", *settings]
    if method == "clusterfit":
        source = out / "rotation"
        if not (source / "checkpoints/last.ckpt").exists():
            sys.exit("clusterfit clusters the features of rotation: run that first")
        common.append(f"method.source.path={source}")
    trial = out / "trials" / method
    if not (trial / "metrics.csv").exists():
        unlabeled(*common, "trainer.max_steps=15", "evals=none", f"hydra.run.dir={trial}")
    steps = max(20, int(seconds * speed(trial) / batch))
    unlabeled(
        *common,
        f"trainer.max_steps={steps}",
        "trainer.max_epochs=-1",
        f"hydra.run.dir={out / method}",
    )


def table(out: Path, batch: int) -> str:
    """Markdown: scores of what ran, with their baselines."""
    lines = [
        "| `method=` | images seen | kNN | random init | best-stage linear | random init |",
        "|---|---|---|---|---|---|",
    ]
    pixels = ""
    for method in METHODS:
        path = out / method / "scores.json"
        if not path.exists():
            continue
        scores = json.loads(path.read_text())
        steps = json.loads((out / method / "status.json").read_text())["trained"]["max_steps"]
        knn = "knn/k20_t0.07/top1"

        def best(prefix: str, scores: dict[str, float] = scores) -> str:
            of_stage = {
                name.removeprefix(prefix).split("/")[1]: value
                for name, value in scores.items()
                if name.startswith(f"{prefix}linear/") and name.endswith("/top1")
            }
            stage = max(of_stage, key=lambda s: of_stage[s])
            return f"{100 * of_stage[stage]:.1f} ({stage})"

        lines.append(
            f"| `{method}` | {steps * batch:,} | {100 * scores[knn]:.1f} | "
            f"{100 * scores[f'baseline/random/{knn}']:.1f} | {best('')} | "
            f"{best('baseline/random/')} |"
        )
        linear = scores["baseline/pixels/linear/pixels/top1"]
        near = scores[f"baseline/pixels/{knn}"]
        pixels = f"Raw pixels: kNN {100 * near:.1f}, linear {100 * linear:.1f}."
    return "\n".join([*lines, "", pixels])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240, help="training time of each method")
    parser.add_argument("--batch", type=int, default=256, help="images per update")
    parser.add_argument("--out", type=Path, default=Path("outputs/results"))
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--set", nargs="*", default=[], help="more overrides, e.g. data.limit=10000"
    )
    parser.add_argument("--table", action="store_true", help="print only")
    args = parser.parse_args()
    for method in () if args.table else args.methods:
        train(method, args.out, args.seconds, args.batch, args.set)
    print(table(args.out, args.batch))


if __name__ == "__main__":
    main()
