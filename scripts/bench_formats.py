"""A step of ResNet-18 in channels_last and in bfloat16, against float32 in NCHW."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from bench_rows import Row, per_round, seconds
from torch import Tensor

from unlabeled.backbones.resnet import ResNet

SIDE, BAR = 32, 2.0


def rows(rounds: int = 5, batch: int = 128, width: int = 64) -> list[Row]:
    """A step of ResNet-18 in channels_last, and in bfloat16 too where the CPU computes it.

    Args:
        rounds: turns of one step each, after one that is not counted.
        batch: images.
        width: channels of the first stage; a ResNet-18 has 64.
    """
    x = torch.randn(batch, 3, SIDE, SIDE)
    last = x.contiguous(memory_format=torch.channels_last)
    net = ResNet(depth=18, width=width, stem="small")
    steps = {"nchw": _plain_step(net, x), "last": _plain_step(copy.deepcopy(net), last)}
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if fast:
        steps["bf16"] = _plain_step(copy.deepcopy(net), last, bf16=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - start)
    note = f"ResNet-18, {SIDE}x{SIDE}, batch {batch}, one thread; median of {rounds} steps"
    name = "a step: float32 NCHW / bfloat16 channels_last"
    absent = Row(name, bar=BAR, note="skipped: this CPU has neither AMX nor AVX512-bf16")
    return [
        _faster("a step: float32 NCHW / float32 channels_last", times, "last", note),
        _faster(name, times, "bf16", note, bar=BAR) if fast else absent,
    ]


def _faster(
    name: str,
    times: Mapping[str, Sequence[float]],
    which: str,
    note: str,
    bar: float | None = None,
) -> Row:
    ratios = per_round(times["nchw"], times[which])
    said = {"ours": seconds(times[which]), "other": seconds(times["nchw"]), "note": note}
    return Row(name, ratios, bar=bar, **said)


def _plain_step(net: Any, x: Tensor, *, bf16: bool = False) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = net(x)
        optimizer.zero_grad()
        features.float().square().mean().backward()
        optimizer.step()

    return step
