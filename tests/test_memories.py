"""Memories in half precision, and a bank in shards over processes against a whole one."""

import os
from functools import cache

import pytest
import test_ddp
import torch
import torch.nn.functional as F
from processes import on_processes
from torch import nn

from unlabeled.dist import mine, rank, world_size
from unlabeled.draws import Draws
from unlabeled.parts import sharded_bank
from unlabeled.parts.losses import info_nce
from unlabeled.parts.memory import KEPT, MemoryBank, Queue
from unlabeled.parts.sharded_bank import ShardedBank, memory_bank

HALVES = ["bfloat16", "float16"]
SIZE, DIM, BATCH = 21, 6, 12  # rows that neither two nor three processes share out evenly


def units(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def a_life(made, dtype):
    """What a bank gives and becomes, for a global batch that the processes share."""
    sharded_bank.ROWS = 4  # several pieces
    bank = made(SIZE, DIM, dtype=dtype)
    bank.fill(Draws(0, "memory"))
    found = {"first": bank.everything()}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(SIZE, (BATCH,), generator=generator)  # some images twice
        bank.update(mine(index), mine(units(BATCH, DIM, seed=step)))
    found["rows"] = bank[mine(index)]
    found["each its own"] = bank[mine(index.view(-1, 2).repeat_interleave(2, 0))]
    found["shared"] = bank.shared(index.view(3, 4))
    found["everything"] = bank.everything()
    found["saved"] = bank.state_dict()["bank"]
    found["here"] = torch.tensor(sum(x.numel() for x in bank.buffers()))
    again = made(SIZE, DIM, dtype=dtype)
    again.load_state_dict({"bank": found["everything"].clone()})
    found["loaded"] = again.everything()
    return found


@cache
def alone(dtype):
    return a_life(MemoryBank, dtype)


def lives():
    return {dtype: a_life(ShardedBank, dtype) for dtype in KEPT}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_are_a_whole_bank(world):
    every = [lives()] if world == 1 else on_processes(world, lives)
    for dtype in KEPT:
        expected = alone(dtype)
        assert expected["first"].dtype == KEPT[dtype]
        for name in ("first", "shared", "everything", "loaded"):
            for found in every:
                assert torch.equal(found[dtype][name], expected[name]), name
        for name in ("rows", "each its own"):
            found = torch.cat([x[dtype][name] for x in every])
            assert torch.equal(found, expected[name]), name
        assert torch.equal(every[0][dtype]["saved"], expected["everything"])
        assert all(len(x[dtype]["saved"]) == 0 for x in every[1:])  # one copy is enough
        assert all(x[dtype]["here"] == (-(-SIZE // world) + 1) * DIM for x in every)


def test_a_bank_is_drawn_in_pieces_as_at_once(monkeypatch):
    for unit in (True, False):
        banks = [MemoryBank(64, 8), MemoryBank(64, 8)]
        banks[0].fill(Draws(0, "memory"), unit=unit)
        monkeypatch.setattr("unlabeled.parts.memory.ROWS", 16)
        banks[1].fill(Draws(0, "memory"), unit=unit)
        monkeypatch.undo()
        assert torch.equal(banks[0].bank, banks[1].bank)


@pytest.mark.parametrize("made", [MemoryBank, ShardedBank])
def test_a_row_of_a_shared_out_bank_moves_to_the_bisector(made):
    bank, v = made(5, 4, 0.5), units(1, 4, seed=3)
    bank.fill(Draws(0))
    before = bank.everything()
    bank.update(torch.tensor([3]), v)
    after = bank.everything()
    torch.testing.assert_close(after[3], F.normalize((before[3] + v[0]) / 2, dim=0))
    rest = [0, 1, 2, 4]
    assert torch.equal(after[rest], before[rest])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("made", [MemoryBank, ShardedBank])
def test_half_a_bank_is_the_rounded_bank(made, dtype):
    half, exact = made(40, 32, dtype=dtype), made(40, 32)
    for bank in (half, exact):
        bank.fill(Draws(0))
        for step in range(4):
            bank.update(torch.arange(step, 40, 2), units(len(range(step, 40, 2)), 32, seed=step))
    bits = {"bfloat16": 8, "float16": 11}[dtype]
    error = (half.everything().float() - exact.everything()).abs().max()
    assert 0 < error < 4 * 0.5**bits
    norms = half.everything().float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(40), rtol=0, atol=0.5**bits)
    assert half.state_dict()["bank"].element_size() == 2


@pytest.mark.parametrize("dtype", HALVES)
def test_a_loss_of_half_a_queue_is_computed_in_full_precision(dtype):
    half, exact = Queue(30, 16, dtype=dtype), Queue(30, 16)
    q = units(8, 16, seed=1).requires_grad_()
    for queue in (half, exact):
        queue.fill(Draws(0))
        queue.push(units(8, 16, seed=2))
    k = units(8, 16, seed=2)
    losses = [info_nce(q, k, queue.snapshot(), 0.07) for queue in (half, exact)]
    rounded = info_nce(q, k, exact.snapshot().to(KEPT[dtype]).float(), 0.07)
    assert losses[0].dtype == torch.float32
    assert losses[0].item() == pytest.approx(rounded.item(), rel=1e-6)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    assert torch.autograd.grad(losses[0], q)[0].dtype == torch.float32


def test_what_holds_a_memory_may_be_cast():
    holder = nn.ModuleList([Queue(4, 2, dtype="float16"), MemoryBank(4, 2), nn.Linear(2, 2)])
    with torch.no_grad():
        holder[1].fill(Draws(0))
    before = holder[1].bank.clone()
    half, bank, layer = holder.bfloat16()
    assert (half.keys.dtype, bank.bank.dtype) == (torch.float16, torch.float32)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(bank.bank, before)  # and was not rounded on the way
    holder.double()
    assert (half.keys.dtype, bank.bank.dtype) == (torch.float16, torch.float64)
    assert half.head.dtype == torch.int64
    holder.to("meta")
    assert bank.bank.is_meta


@pytest.mark.parametrize("made", [MemoryBank, ShardedBank, Queue])
def test_another_format_or_size_in_a_checkpoint_is_refused(made):
    saved = made(6, 4, dtype="bfloat16").state_dict()
    key = "keys" if made is Queue else "bank"
    same = made(6, 4, dtype="bfloat16")
    same.load_state_dict(saved)
    assert same.state_dict()[key].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=f"{key} is kept in torch.bfloat16 in the checkpoint and"):
        made(6, 4).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"kept in torch\.float32"):
        made(6, 4, dtype="float16").load_state_dict(made(6, 4).state_dict())
    with pytest.raises(ValueError, match=r"shape \(6, 4\) in the checkpoint and \(7, 4\) here"):
        made(7, 4, dtype="bfloat16").load_state_dict(saved)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
        made(6, 4, dtype="int8")
    made(6, 4).load_state_dict(made(6, 4).double().state_dict())  # a run in trainer.precision=64


def test_a_shared_out_bank_misses_its_key_aloud():
    with pytest.raises(RuntimeError, match="Missing key"):
        ShardedBank(6, 4).load_state_dict({})
    with pytest.raises(ValueError, match="storage must be whole or sharded, got 'mapped'"):
        memory_bank(6, 4, 0.5, storage="mapped")
    assert type(memory_bank(6, 4, 0.5, storage="sharded")) is ShardedBank


# Whole methods.

SHARDED = [*test_ddp.OWN["pirl"], "method.bank.storage=sharded"]


def trained_in_shards():
    os.environ["LOCAL_RANK"] = str(rank())
    found = {}
    for name in ("pirl_rotation", "npid"):
        test_ddp.OWN[name] = SHARDED
        found[name] = test_ddp.trained(name, None, None)
    return {**found, "world": world_size()}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_methods_learn_with_shards_as_one_process_does_with_a_whole_bank():
    first, second = on_processes(2, trained_in_shards)
    for name in ("pirl_rotation", "npid"):
        expected = test_ddp.trained(name, None, None)
        for found in (first[name], second[name]):
            torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=1e-6)
        for key, value in expected["state"].items():
            torch.testing.assert_close(first[name]["state"][key], value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "lines",
    [
        ("moco_v2", "method.queue_dtype=float16"),
        ("npid", "method.bank.dtype=bfloat16"),
        ("pirl_rotation", "method.bank.dtype=float16", "method.bank.storage=sharded"),
    ],
    ids=lambda lines: lines[0],
)
def test_half_memories_train_and_go_on_exactly(tiny, tmp_path, lines):
    from unlabeled.callbacks.checkpoint import Checkpoint

    states = []
    for name, resume in (("whole", None), ("on", tmp_path / "whole/last-1.ckpt")):
        method, data, trainer = tiny(
            *lines, enable_checkpointing=True, callbacks=[Checkpoint(folder=str(tmp_path / name))]
        )
        trainer.fit(method, data, ckpt_path=resume, weights_only=True)
        states.append(torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"])
    assert any(x.dtype in (torch.bfloat16, torch.float16) for x in states[0].values())
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key
