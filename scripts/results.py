"""The README's table of methods: every method for the same CPU time on the same small ResNet.

    python scripts/results.py              # runs what is missing, then prints the table
    python scripts/results.py --table      # prints what there is

Each method first runs for two passes over its images: the second shows what an update costs, the
first what is done once (features of a source), and so how many updates fit into the budget. Then
it trains for as many with its own schedule (experiment/cifar10/<method>), in one thread. What came
of a run is kept in docs/results, and a run whose record exists is not
repeated: the table continues where it stopped, on another machine too. To measure a method
again, delete its record.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METHODS = tuple(sorted(p.stem for p in (ROOT / "conf/experiment/cifar10").glob("*.yaml")))
SOURCES = {  # what a method starts from, and the key that names it
    "clusterfit": ("rotation", "method.source.path"),
    "distillation": ("supervised", "method.teacher.path"),
}
RECORDS = ROOT / "docs/results"
KNN = "knn/k20_t0.07/top1"
HEADER = """\
| `method=` | images seen | CPU min | kNN | random | linear, final | random | linear, best stage \
| random | seeds |
|---|---|---|---|---|---|---|---|---|---|"""


def folder(out: Path, method: str, seed: int) -> Path:
    """Where a run lies."""
    return out / f"seed{seed}" / method


def unlabeled(*overrides: str) -> None:
    """One run, in a process of its own and one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unlabeled.train", *overrides]
    subprocess.run(command, check=True, env=environment)


def column(run: Path, name: str) -> list[float]:
    """A metric's values in order."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def record(method: str, seed: int) -> Path:
    """Where what came of a run is kept."""
    return RECORDS / f"{method}_seed{seed}.json"


def train(method: str, seed: int, args: argparse.Namespace) -> None:
    """Trains and evaluates one method, if its scores are not there yet."""
    run = folder(args.out, method, seed)
    if not (run / "scores.json").exists():
        common = _settings(method, seed, args)
        trial = args.out / "trials" / method
        if not (trial / "status.json").exists() or not status(trial).get("trained"):
            short = ["trainer.max_epochs=2", "evals=none", "callbacks.throughput.every_n_steps=1"]
            unlabeled(*common, *short, f"hydra.run.dir={trial}")
        steps = affordable(column(trial, "perf/cpu_seconds"), 60 * args.minutes)
        long = ["trainer.max_epochs=-1", f"trainer.max_steps={steps}", f"hydra.run.dir={run}"]
        unlabeled(*common, f"seed={seed}", *long)
    RECORDS.mkdir(exist_ok=True)
    if not record(method, seed).exists():  # else this was a source's second training
        record(method, seed).write_text(json.dumps(measured(run), indent=1) + "\n")


def affordable(spent: list[float], budget: float) -> int:
    """Updates that fit into a budget.

    Args:
        spent: CPU seconds until the end of every update of two passes over the images.
        budget: CPU seconds.
    """
    half = len(spent) // 2  # what happens once per pass is in the second too
    each = (spent[-1] - spent[half - 1]) / (len(spent) - half)
    once = max(0.0, spent[half - 1] - half * each)
    return max(half, round((budget - once) / each))


def _settings(method: str, seed: int, args: argparse.Namespace) -> list[str]:
    common = [f"experiment=cifar10/{method}", f"data.limit={args.images}", "trainer=cpu"]
    common += args.set
    if method in SOURCES:
        source, key = SOURCES[method]
        if not (folder(args.out, source, seed) / "scores.json").exists():
            train(source, seed, args)  # on another machine too: its weights are needed
        common.append(f"{key}={folder(args.out, source, seed)}")
    return common


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def measured(run: Path) -> dict[str, Any]:
    """What the table shows of a run."""
    scores = json.loads((run / "scores.json").read_text())
    details = json.loads((run / "scores_details.json").read_text())
    found = {
        "command": " ".join(["unlabeled", *status(run)["command"].split()[1:]]),
        "commit": status(run)["commit"],
        "torch": status(run)["versions"]["torch"],
        "images": status(run)["trained"]["max_steps"] * status(run)["identity"]["data.batch_size"],
        "minutes": max(column(run, "perf/cpu_seconds")) / 60,
        "knn": scores[KNN],
        "random knn": scores[f"baseline/random/{KNN}"],
        "pixels knn": scores[f"baseline/pixels/{KNN}"],
        "pixels linear": scores["baseline/pixels/linear/pixels/top1"],
    }
    for kind, prefix in (("", ""), ("random ", "baseline/random/")):
        names = [n for n in scores if n.startswith(f"{prefix}linear/") and n.endswith("/top1")]
        stage = details[names[0]]["best_stage"]  # by held-out training images, not by the test
        found[f"{kind}linear"] = scores[f"{prefix}linear/{stage}/top1"]
        found[f"{kind}stage"] = stage
        final = f"{prefix}linear/final/top1"  # left out where the last stage is the same
        found[f"{kind}final"] = scores[final if final in scores else names[-1]]
    return found


def table(methods: tuple[str, ...]) -> str:
    """Markdown: scores of what was recorded, with their baselines, averaged over seeds."""
    lines, pixels = [HEADER], ""
    for method in methods:
        runs = sorted(RECORDS.glob(f"{method}_seed*.json"))
        if not runs:
            continue
        all_of = [json.loads(path.read_text()) for path in runs]

        def mean(name: str, all_of: list[dict[str, Any]] = all_of) -> float:
            return statistics.fmean(found[name] for found in all_of)

        def shown(name: str, all_of: list[dict[str, Any]] = all_of) -> str:
            values = [100 * found[name] for found in all_of]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.1f}{spread}"

        def stages(name: str, all_of: list[dict[str, Any]] = all_of) -> str:
            return ", ".join(sorted({found[name] for found in all_of}))

        lines.append(
            f"| `{method}` | {mean('images'):,.0f} | {mean('minutes'):.1f} | {shown('knn')} | "
            f"{shown('random knn')} | {shown('final')} | {shown('random final')} | "
            f"{shown('linear')} ({stages('stage')}) | "
            f"{shown('random linear')} ({stages('random stage')}) | {len(runs)} |"
        )
        near, linear = 100 * mean("pixels knn"), 100 * mean("pixels linear")
        pixels = f"Raw pixels: kNN {near:.1f}, linear {linear:.1f}."
    return "\n".join([*lines, "", pixels])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4, help="CPU minutes of each training")
    parser.add_argument("--images", type=int, default=10000, help="training images")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/results"))
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--set", nargs="*", default=[], help="more overrides, for every run")
    parser.add_argument("--table", action="store_true", help="print only")
    args = parser.parse_args()
    failed = []
    for seed in () if args.table else args.seeds:
        for method in args.methods:
            try:
                if not record(method, seed).exists():
                    train(method, seed, args)
            except subprocess.CalledProcessError as error:  # the others go on
                failed.append(f"{method}, seed {seed}: exit code {error.returncode}")
    print(table(tuple(args.methods)))
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
