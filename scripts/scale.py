"""How many GPUs, workers and hours a pretraining takes, and how much memory: docs/scale.md.

    python scripts/scale.py                      # the tables of docs/scale.md
    python scripts/scale.py --images 2e8 --epochs 100 --gpus 64 --step-rate 2470 --decode-rate 700

What a GPU and a core do is given in images per second of one 224 x 224 view; everything else is
arithmetic. GPU rates are published figures of supervised ResNet-50s, not ours.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VIEW = 224  # pixels, the side that rates are given for
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    Args:
        name: of a row.
        images: of the training set.
        epochs: passes over them.
        crops: side of every crop that is learned from, in pixels.
        targets: side of every crop that only goes forward (momentum encoders).
        batch: images of an update, over all GPUs.
        flops: of one view forward, relative to ResNet-50's 4.1 billion multiplications.
        parameters: of the network.
        recompute: activations are computed again (activation checkpointing).
        sharded: weights in shards (`trainer=fsdp`), else `trainer=ddp`.
        kilobytes: of an image on the disk.
    """

    name: str
    images: float
    epochs: float
    crops: tuple[int, ...] = (224, 224)
    targets: tuple[int, ...] = ()
    batch: int = 4096
    flops: float = 1.0
    parameters: float = 25.6e6
    recompute: bool = False
    sharded: bool = False
    kilobytes: float = 110.0

    @property
    def views(self) -> float:
        """Training steps of one 224 x 224 view that an image costs, forward a third of one."""
        one = sum((s / VIEW) ** 2 for s in self.crops) * (4 / 3 if self.recompute else 1)
        return one + sum((s / VIEW) ** 2 for s in self.targets) / 3


@dataclass(frozen=True)
class Machines:
    """What it is trained on.

    Args:
        gpus: of all nodes.
        step_rate: supervised training images per second of one GPU, ResNet-50 at 224 pixels.
        efficiency: of the network on that GPU, relative to ResNet-50's.
        decode_rate: images per second that one worker decodes and crops.
        workers: per GPU.
        network: gigabytes per second between GPUs, for each.
        disk: gigabytes per second of the storage, for all; infinite where not given.
    """

    gpus: int = 8
    step_rate: float = 2078.0
    efficiency: float = 1.0
    decode_rate: float = 500.0
    workers: int = 8
    network: float = 10.0
    disk: float = math.inf


@dataclass(frozen=True)
class Plan:
    """What comes of a job on machines."""

    rate: float  # images per second, all GPUs
    bound: str  # by what: GPUs, network, workers or disk
    hours: float
    gpu_hours: float
    workers: int  # per GPU, so that they are not the bound
    read: float  # gigabytes per second from the disk
    updates: float


def plan(job: Job, machines: Machines) -> Plan:
    """Rate, hours and what bounds them.

    An update costs its computation and what of the exchange of gradients (with weights in shards
    also of weights, twice) the backward pass, two thirds of the computation, does not hide.
    """
    here = job.batch / machines.gpus
    compute = here * job.views * job.flops / (machines.step_rate * machines.efficiency)
    share = (machines.gpus - 1) / machines.gpus
    volume = 4 * job.parameters * share * (3 if job.sharded else 2) / 1e9
    exposed = max(0.0, volume / machines.network - 2 / 3 * compute)
    rates = {
        "network" if exposed > 0.05 * compute else "GPUs": job.batch / (compute + exposed),
        "workers": machines.gpus * machines.workers * machines.decode_rate,
        "disk": machines.disk * 1e6 / job.kilobytes,
    }
    bound = min(rates, key=lambda name: rates[name])
    rate = rates[bound]
    hours = job.images * job.epochs / rate / 3600
    possible = job.batch / (compute + exposed) / machines.gpus
    return Plan(
        rate=rate,
        bound=bound,
        hours=hours,
        gpu_hours=hours * machines.gpus,
        workers=math.ceil(possible / machines.decode_rate),
        read=rate * job.kilobytes / 1e6,
        updates=job.images * job.epochs / job.batch,
    )


def bank(images: float, dim: int, dtype: str = "float32", processes: int = 1) -> float:
    """Gigabytes of a memory bank, or of features, that each process holds."""
    return math.ceil(images / processes) * dim * BYTES[dtype] / 1e9


def similarities(batch: int, chunk: int | None = None) -> float:
    """Gigabytes of one float32 matrix of SimCLR's similarities, all rows or `chunk` of them."""
    return 4 * min(2 * batch, chunk or 2 * batch) * 2 * batch / 1e9


def weights(parameters: float, processes: int = 1, states: int = 1) -> float:
    """Gigabytes of float32 weights, gradients and so many optimizer states, of each process."""
    return 4 * parameters * (2 + states) / processes / 1e9


SWAV, SEER_CROPS = (224, 224, *[96] * 6), (224, 224, *[96] * 4)
SEER = Job(
    "SEER, RegNetY-256GF, 1 B images x 1",
    *(1e9, 1),
    crops=SEER_CROPS,
    batch=8192,
    flops=256 / 4.1,
    parameters=1.3e9,
    recompute=True,
    sharded=True,
)
JOBS = (
    Job("SimCLR, ImageNet-1k x 200", 1.281e6, 200),
    Job("MoCo v2, ImageNet-1k x 200", 1.281e6, 200, (224,), (224,), batch=256),
    Job("SwAV 2 + 6, ImageNet-1k x 200", 1.281e6, 200, SWAV),
    Job("SwAV 2 + 6, YFCC-1M x 800", 1e6, 800, SWAV),
    Job("SwAV 2 + 6, ResNet-50, 1 B images x 1", 1e9, 1, SWAV, batch=8192),
    SEER,
)
A100 = Machines()
NODES = (A100, dataclasses.replace(A100, gpus=64), dataclasses.replace(A100, gpus=512))


def machines_for(job: Job, machines: Machines) -> Machines:
    """The same, with the efficiency that SEER's published time says of its trunk."""
    large = job.flops > 10
    return dataclasses.replace(machines, efficiency=0.63) if large else machines


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def hours_table() -> str:
    """Hours of the jobs on 8, 64 and 512 GPUs, and what feeds them."""
    rows = []
    for job in JOBS:
        for machines in NODES:
            if job.batch / machines.gpus < 16:
                continue  # GPUs would idle between layers
            found = plan(job, machines_for(job, machines))
            rows.append(
                [
                    *(job.name, str(machines.gpus), f"{found.rate:,.0f}", found.bound),
                    *(_time(found.hours), f"{found.gpu_hours:,.0f}", str(found.workers)),
                    f"{found.read:.2f}",
                ]
            )
    head = ["what", "GPUs", "images/s", "bound by", "time", "GPU hours", "workers per GPU"]
    return table([*head, "read, GB/s"], rows)


def memory_table() -> str:
    """What memories, losses, features and weights take, in GB of each process."""
    m, rows = 1e6, []
    for name, n in (("ImageNet-1k", 1.281 * m), ("YFCC-100M", 100 * m), ("1 B images", 1000 * m)):
        half = (f"{bank(n, 128, 'float16', p):.2f}" for p in (1, 64))
        bank_cells = [f"{bank(n, 128):.2f}", *half]
        rows.append([f"bank of {name}, 128-d", *bank_cells])
    rows.append(["queue of 65 536, 128-d", f"{bank(65536, 128):.3f}", "0.017", "whole"])
    for name, n, d in (("ImageNet-1k, 2048-d", 1.281 * m, 2048), ("YFCC-100M, 256-d", 1e8, 256)):
        cells = [f"{bank(n, d):.1f}", f"{bank(n, d, 'bfloat16'):.1f}"]
        rows.append([f"features of {name}", *cells, f"{bank(n, d, 'float32', 64):.2f} (float32)"])
    found = table(["what", "float32, whole", "16 bits, whole", "16 bits, 1 of 64 shards"], rows)
    losses = table(
        ["SimCLR's similarities, one matrix", "whole", "chunk=1024"],
        [
            [f"batch {b:,}", f"{similarities(b):.2f}", f"{similarities(b, 1024):.3f}"]
            for b in (1024, 4096, 16384, 65536)
        ],
    )
    models = table(
        ["weights, gradients and momentum", "ddp", "fsdp, 8 GPUs", "fsdp, 64 GPUs"],
        [
            [name, *(f"{weights(p, w):.2f}" for w in (1, 8, 64))]
            for name, p in (("ResNet-50", 25.6e6), ("RegNetY-256GF", 1.3e9))
        ],
    )
    return f"{found}\n\n{losses}\n\n{models}"


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a pretraining takes.")
    for fields, group in ((dataclasses.fields(Job), "job"), (dataclasses.fields(Machines), "on")):
        options = parser.add_argument_group(group)
        for field in fields:
            flag, kind = f"--{field.name.replace('_', '-')}", field.type
            if kind in (bool, "bool"):
                options.add_argument(flag, action="store_true", default=None)
            elif field.name in ("crops", "targets"):
                options.add_argument(flag, type=int, nargs="*", help="sides in pixels")
            else:
                options.add_argument(flag, type=kind if callable(kind) else str)  # type: ignore[arg-type]
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if not given:
        print(f"{hours_table()}\n\n{memory_table()}")
        return 0
    own = {f.name for f in dataclasses.fields(Job)}
    fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    numbers = {k: v for k, v in fixed.items() if isinstance(v, int | float)}
    if wrong := [f"--{k.replace('_', '-')}" for k, v in numbers.items() if v <= 0]:
        parser.error(f"must be positive: {', '.join(wrong)}")
    job = Job(
        **{"name": "job", "images": 1.281e6, "epochs": 1.0}
        | {k: v for k, v in fixed.items() if k in own}
    )
    found = plan(job, Machines(**{k: v for k, v in fixed.items() if k not in own}))
    for name, value in dataclasses.asdict(found).items():
        print(f"{name:10} {value if isinstance(value, str) else f'{value:,.4g}'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
