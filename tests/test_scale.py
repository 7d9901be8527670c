"""The model of what pretraining takes: its arithmetic, a published time, and its document."""

import math
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import scale
from scale import A100, SEER, Job, Machines, plan


def test_a_plan_is_its_arithmetic():
    job = Job("two views", 1e6, 10, batch=1024, parameters=1e6, kilobytes=100)
    found = plan(job, Machines(gpus=4, step_rate=1000, decode_rate=200, workers=4, network=100))
    assert found.rate == pytest.approx(4 * 1000 / 2)  # two views of an image
    assert (found.bound, found.workers) == ("GPUs", 3)  # 500 images/s of a GPU, 200 of a worker
    assert found.hours == pytest.approx(1e7 / 2000 / 3600)
    assert found.gpu_hours == pytest.approx(4 * found.hours)
    assert found.read == pytest.approx(0.2)  # GB/s
    assert found.updates == pytest.approx(1e7 / 1024)


@pytest.mark.parametrize(
    ("changes", "bound", "rate"),
    [
        ({"decode_rate": 50.0}, "workers", 4 * 4 * 50),
        ({"disk": 0.05}, "disk", 500),
        # 24 MB to and fro beside a step of 0.512 s, of which two thirds hide some
        ({"network": 0.01}, "network", 1024 / (0.512 + 0.6 - 2 / 3 * 0.512)),
    ],
)
def test_what_bounds_it(changes, bound, rate):
    job = Job("two views", 1e6, 10, batch=1024, parameters=1e6, kilobytes=100)
    settings = {"gpus": 4, "step_rate": 1000, "decode_rate": 200, "workers": 4, "network": 100}
    found = plan(job, Machines(**{**settings, **changes}))
    assert found.bound == bound
    assert found.rate == pytest.approx(rate)


def test_views_count_by_area_and_pass():
    assert Job("", 1, 1).views == 2
    assert Job("", 1, 1, (224,), (224,)).views == pytest.approx(4 / 3)
    assert Job("", 1, 1, (112,)).views == pytest.approx(1 / 4)
    assert Job("", 1, 1, recompute=True).views == pytest.approx(8 / 3)


def test_seers_published_time_comes_out():
    """8 days on 512 V100s at a batch of 8704, 6.1 s each; a V100 does 1007 to 1200 images/s."""
    import dataclasses

    v100 = Machines(gpus=512, step_rate=8056 / 8, network=10)
    job = dataclasses.replace(SEER, batch=8704)
    found = plan(job, scale.machines_for(job, v100))
    assert found.hours / 24 == pytest.approx(8.1, rel=0.02)
    assert 8704 / found.rate == pytest.approx(6.125, rel=0.02)


def test_memories():
    assert scale.bank(1e8, 128) == pytest.approx(51.2)
    assert scale.bank(1e8, 128, "bfloat16", 64) == pytest.approx(0.4)
    assert scale.bank(3, 1, processes=2) == pytest.approx(8e-9)  # the larger shard
    assert scale.similarities(4096) == pytest.approx(0.268435456)
    assert scale.similarities(4096, 1024) == pytest.approx(0.033554432)
    assert scale.similarities(100, 1024) == scale.similarities(100)
    assert scale.weights(1e9, 8) == pytest.approx(1.5)
    assert math.isinf(A100.disk)


def test_the_document_shows_what_the_script_prints(capsys):
    assert scale.main([]) == 0
    text = (ROOT / "docs/scale.md").read_text()
    for part in capsys.readouterr().out.strip().split("\n\n"):
        assert part in text, "docs/scale.md: paste `python scripts/scale.py` anew"


def test_a_plan_of_ones_own(capsys):
    assert scale.main(["--images", "2e8", "--epochs", "10", "--gpus", "64", "--crops", "112"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    expected = plan(Job("job", 2e8, 10, (112,)), Machines(gpus=64))
    assert told["bound"] == expected.bound
    assert float(told["hours"].replace(",", "")) == pytest.approx(expected.hours, rel=1e-3)
    with pytest.raises(SystemExit) as error:
        scale.main(["--gpus", "0"])
    assert error.value.code == 2
    assert "must be positive: --gpus" in capsys.readouterr().err
