"""AVID and cross-modal agreement: the loss by hand, negatives, positive sets, banks, sources."""

import math

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from test_relative_position import alone, near
from torch import nn

from unlabeled.backbones.load import ended
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods import avid
from unlabeled.methods.avid import AVID
from unlabeled.parts import agreement as parts
from unlabeled.parts.agreement import Agreement, agreeing, others
from unlabeled.parts.bank_nce import BankNCE, positives_nce
from unlabeled.parts.losses import binary_nce
from unlabeled.parts.memory import MemoryBank
from unlabeled.parts.sharded_bank import ShardedBank

N, ROWS, K, T = 24, 12, 9, 0.3
VARIANTS = ("cross", "within", "joint")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Both(nn.Module):
    """Linear networks of clips and of sound."""

    def __init__(self, seen=6, heard=7, space=4):
        super().__init__()
        self.dim, self.space = 5, space
        self.clip, self.sound = nn.Linear(seen, 5), nn.Linear(heard, 5)
        self.see, self.listen = nn.Linear(5, space), nn.Linear(5, space)

    def forward(self, x):
        return self.clip(x)

    def hear(self, x):
        return self.sound(x)

    def embed(self, seen, heard):
        return self.see(seen), self.listen(heard)


class Deaf(nn.Module):
    dim = 3


def method(variant="cross", agreed=None, **more):
    torch.manual_seed(0)
    rest = {"variant": variant, "negatives": K, "temperature": T, **more}
    if agreed is not None:
        rest["agreement"] = Agreement(positives=3, negatives=5, every_n_epochs=2, **agreed)
    made = alone(AVID(Both(), nn.Identity(), None, **rest))
    made.prepare(N, 0)
    return made.double()


def batch_of(step=0):
    share = ROWS // world_size()
    some = slice(rank() * share, (rank() + 1) * share)
    clips, sounds = noise(ROWS, 6, seed=step), noise(ROWS, 7, seed=step + 50)
    index = torch.randperm(N, generator=torch.Generator().manual_seed(step))[:ROWS]
    return {"views": [clips[some], sounds[some]], "index": index[some]}


def drawn(made, left_out):
    """The rows that are drawn, by the list of those that may be."""
    numbers = made.draws("negatives", len(left_out)).integers(N - len(left_out[0]), K)
    allowed = [[j for j in range(N) if j not in out] for out in left_out]
    return [[rows[r] for r in row] for rows, row in zip(allowed, numbers.tolist(), strict=True)]


def by_hand(made, batch, expected):
    """Every term as its formula's loops; `expected` keeps E of terms that were met before."""
    index = batch["index"].tolist()
    with torch.no_grad():
        v, a = made.backbone.embed(
            made.backbone(batch["views"][0]), made.backbone.hear(batch["views"][1])
        )
    x = {"video": (v / v.norm(dim=1)[:, None]).tolist()}
    x["audio"] = (a / a.norm(dim=1)[:, None]).tolist()
    banks = {"video": made.video.bank.tolist(), "audio": made.audio.bank.tolist()}
    agreed = [made.agreement.sets[i].tolist() for i in index] if made.agrees else [[]] * len(index)
    rows = drawn(made, [[i, *more] for i, more in zip(index, agreed, strict=True)])

    def score(side, other, b, j):
        return sum(p * q for p, q in zip(x[side][b], banks[other][j], strict=True)) / T

    def term(name, side, other, positives, negatives):
        if name not in expected:
            every = [
                math.exp(score(side, other, b, j)) for b in range(len(index)) for j in negatives[b]
            ]
            expected[name] = sum(every) / len(every)
        total = 0.0
        for b in range(len(index)):
            noise_ = len(negatives[b]) * expected[name]
            p = [math.exp(score(side, other, b, j)) for j in positives[b]]
            total -= sum(math.log(e / (e + noise_)) for e in p) / len(p)
            for j in negatives[b]:
                total -= math.log(noise_ / (math.exp(score(side, other, b, j)) + noise_))
        return total / len(index)

    own = [[i] for i in index]
    pairs = [pair.split("_") for pair in avid.VARIANTS[made.variant]]
    terms = {
        f"{side}_{other}": term(f"{side}_{other}", side, other, own, rows) / len(pairs)
        for side, other in pairs
    }
    if made.agrees:
        terms = {name: value / 2 for name, value in terms.items()}
        for side in ("video", "audio"):
            some = [row[:5] for row in rows]
            terms[f"agreement_{side}"] = term(side, side, side, agreed, some) / 4
    return terms


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("by", [None, "consensus"])
def test_the_loss_is_its_formula(variant, by):
    made, expected = method(variant, by and {"by": by, "alone": 1}), {}
    made.variant = variant
    for made.step in range(3):
        made.begin_epoch(made.step)
        assert made.agrees == (by is not None and made.step > 0)
        batch = batch_of(made.step)
        wanted = by_hand(made, batch, expected)
        found = made.loss(batch)
        assert {name: term.item() for name, term in found.items()} == pytest.approx(
            wanted, rel=1e-9
        )
        assert len(wanted) == len(avid.VARIANTS[variant]) + 2 * made.agrees
    for name, e in expected.items():  # frozen
        assert made.nce[name].log_e.exp().item() == pytest.approx(e, rel=1e-9)


@pytest.mark.parametrize(("k", "cost"), [(32, 4.481200638802598), (1024, 7.931959927981299)])
def test_equal_scores_cost_what_npids_do(k, cost):
    made = BankNCE(0.07).double()
    rows = F.normalize(torch.ones(3, 1 + k, 4).double(), dim=2)
    for positives in (1, 5):  # several positives count as one
        found = made(rows[:, 0], rows[:, :1].expand(-1, positives, -1), rows[:, 1:])
        assert found.item() == pytest.approx(cost, rel=1e-9)


def test_one_positive_is_npids_loss_with_z_of_n_e():
    scores, log_e = torch.tanh(noise(5, 1 + K)), torch.tensor(0.7).double()
    ours = positives_nce(scores[:, :1], scores[:, 1:], log_e, T)
    assert ours.item() == pytest.approx(binary_nce(scores, log_e + math.log(N), N, T).item())


def test_negatives_are_uniform_on_what_is_not_left_out():
    left_out = torch.tensor([[5, 0, 9], [9, 8, 7], [0, 1, 2], [3, 6, 4]])
    rows = others(Draws(0, rows=4), 10, 7000, left_out)
    for row, out in zip(rows, left_out.tolist(), strict=True):
        counts = row.bincount(minlength=10)
        assert counts[out].sum() == 0
        allowed = [j for j in range(10) if j not in out]
        assert (counts[allowed] - 1000).abs().max() < 150  # 5 standard deviations


def unit_bank(seed, kind=MemoryBank, n=N):
    bank = kind(n, 4)
    bank.fill(Draws(seed, "bank"))
    return bank


@pytest.mark.parametrize("by", ["consensus", "union", "video", "audio"])
@pytest.mark.parametrize("sizes", [(1024, 8192), (5, 7)])
def test_positive_sets_are_those_of_a_loop(by, sizes, monkeypatch):
    monkeypatch.setattr(parts, "QUERIES", sizes[0])
    monkeypatch.setattr(parts, "BLOCK", sizes[1])
    video, audio = unit_bank(1), unit_bank(2)
    found = agreeing(video, audio, 3, by)
    s_v, s_a = (x.bank.double() @ x.bank.double().T for x in (video, audio))
    choose = {"consensus": min, "union": max, "video": lambda v, _: v, "audio": lambda _, a: a}[by]
    for i in range(N):
        order = sorted(
            (j for j in range(N) if j != i),
            key=lambda j: -choose(s_v[i, j].item(), s_a[i, j].item()),
        )
        assert found[i].tolist() == order[:3]


@pytest.mark.parametrize("by", ["video", "audio", "consensus"])
def test_faiss_and_torch_find_the_same(by, monkeypatch):
    """In more than one block and chunk; torch alone in double precision."""
    monkeypatch.setattr(parts, "QUERIES", 300)
    monkeypatch.setattr(parts, "BLOCK", 450)
    video, audio = unit_bank(1, n=1000), unit_bank(2, n=1000)
    asked = []
    near = parts._near
    monkeypatch.setattr(parts, "_near", lambda q, *rest: asked.append(q.dtype) or near(q, *rest))
    found = agreeing(video, audio, 8, by)
    exact = agreeing(video.double(), audio.double(), 8, by)
    assert torch.equal(found, exact)
    assert set(asked) == (set() if by == "consensus" else {torch.float32, torch.float64})


def test_a_recording_is_not_its_own_positive_even_beside_duplicates():
    video, audio = unit_bank(1), unit_bank(2)
    for bank in (video, audio):
        bank.bank[:6] = bank.bank[0]
    found = agreeing(video, audio, 5, "consensus")
    for i in range(6):
        assert sorted(found[i].tolist()) == [j for j in range(6) if j != i]


def test_consensus_is_what_both_agree_on():
    v, a = torch.tanh(noise(N, N)), torch.tanh(noise(N, N, seed=1))
    both = parts.agreement("consensus", v, a)
    assert (both <= v).all()
    assert (both <= a).all()
    for limit in (-0.5, 0.0, 0.4):
        assert torch.equal(both > limit, (v > limit) & (a > limit))
        assert torch.equal(parts.agreement("union", v, a) > limit, (v > limit) | (a > limit))
    x = unit_bank(1).bank
    s = parts.agreement("consensus", x @ x.T, x @ x.T)
    near(s, s.T)
    near(s.diagonal(), torch.ones(N))


def test_positives_are_never_negatives():
    made = method("cross", {"alone": 1})
    made.begin_epoch(1)
    seen, own = [], avid.others

    def watched(draws, n, count, left_out):
        rows = own(draws, n, count, left_out)
        seen.append((rows, left_out))
        return rows

    avid.others = watched
    try:
        made.loss(batch := batch_of())
    finally:
        avid.others = own
    ((rows, left_out),) = seen
    assert torch.equal(
        left_out, torch.cat([batch["index"][:, None], made.agreement[batch["index"]]], 1)
    )
    assert not (rows[:, :, None] == left_out[:, None]).any()


def test_a_term_teaches_the_side_that_asks_and_no_bank():
    made = method()
    before = made.audio.bank.clone()
    batch = batch_of()
    made.loss(batch)["video_audio"].backward()
    for part in (made.backbone.clip, made.backbone.see):
        assert part.weight.grad.abs().sum() > 0
    for part in (made.backbone.sound, made.backbone.listen):
        assert part.weight.grad is None
    assert not any(bank.requires_grad for bank in (made.video.bank, made.audio.bank))
    others_ = [i for i in range(N) if i not in batch["index"].tolist()]
    assert torch.equal(made.audio.bank[others_], before[others_])
    _, a = made.backbone.embed(*([made.backbone.hear(batch["views"][1])] * 2))
    moved = F.normalize(0.5 * before[batch["index"]] + 0.5 * F.normalize(a, dim=1), dim=1)
    near(made.audio.bank[batch["index"]], moved.detach(), atol=1e-12)


def swapped(made):
    """The same method with clips in the place of sound."""
    twin = AVID(Both(7, 6), nn.Identity(), None, negatives=K, temperature=T)
    twin = alone(twin)
    twin.prepare(N, 0)
    twin = twin.double()
    for a, b in (("clip", "sound"), ("see", "listen")):
        getattr(twin.backbone, a).load_state_dict(getattr(made.backbone, b).state_dict())
        getattr(twin.backbone, b).load_state_dict(getattr(made.backbone, a).state_dict())
    twin.video.bank.copy_(made.audio.bank)
    twin.audio.bank.copy_(made.video.bank)
    return twin


def test_modalities_may_be_exchanged():
    made = method()
    twin = swapped(made)
    for step in range(2):  # E is another one after the first
        made.step = twin.step = step
        batch = batch_of(step)
        one = made.loss(batch)
        two = twin.loss({**batch, "views": batch["views"][::-1]})
        assert one["video_audio"].item() == pytest.approx(two["audio_video"].item(), rel=1e-12)
        assert one["audio_video"].item() == pytest.approx(two["video_audio"].item(), rel=1e-12)
    near(made.video.bank, twin.audio.bank, atol=1e-12)


def test_without_sound_every_recording_sounds_alike():
    made = method()
    batch = batch_of()
    mute = {**batch, "views": [batch["views"][0], torch.zeros_like(batch["views"][1])]}
    v, a = made.backbone.embed(
        made.backbone(mute["views"][0]), made.backbone.hear(mute["views"][1])
    )
    assert (a == a[0]).all()
    assert not (v == v[0]).all()
    loss = made.loss(mute)
    loss["video_audio"].backward()
    made.zero_grad()
    # A sound that is everybody's cannot tell one clip's memory from another's: what it is taught
    # does not depend on the sound, and the projection's input is its bias alone.
    made.loss(mute)["audio_video"].backward()
    assert made.backbone.sound.weight.grad.abs().sum() == 0
    assert all(term.isfinite() for term in loss.values())


def test_sets_are_found_every_few_epochs_after_the_first():
    made = method("cross", {"alone": 3})
    found = []
    for epoch in range(8):
        made.video.fill(Draws(epoch, "other"))
        made.begin_epoch(epoch)
        found.append((made.agrees, int(made.agreement.epoch)))
        sets = made.agreement.sets.clone()
        made.video.fill(Draws(epoch + 100, "other"))
        made.begin_epoch(epoch)  # a run that goes on within the epoch
        assert torch.equal(made.agreement.sets, sets)
    assert found == [(False, -1)] * 3 + [(True, 3), (True, 3), (True, 5), (True, 5), (True, 7)]
    assert {"agreement.sets", "agreement.epoch", "video.bank", "audio.bank"} <= {*made.state_dict()}


def sets_of(kind=MemoryBank):
    parts.QUERIES, parts.BLOCK = 5, 7  # 24 rows: a last chunk that is not full
    return agreeing(unit_bank(1, kind), unit_bank(2, kind), 3, "consensus")


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_processes_find_the_sets_of_one():
    one = agreeing(unit_bank(1), unit_bank(2), 3, "consensus")
    for found in on_processes(2, both_kinds):
        for sets in found:
            assert torch.equal(sets, one)


def both_kinds():
    return [sets_of(), sets_of(ShardedBank)]


def learned():
    made = method("joint", {"alone": 1})
    losses = []
    for made.step in range(3):
        made.begin_epoch(made.step)
        loss = torch.stack([*made.loss(batch_of(made.step)).values()]).sum()
        loss.backward()
        losses.append(mean(loss.detach()))
    return [*losses, *(mean(p.grad) for p in made.parameters()), made.video.bank, made.audio.bank]


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_processes_equal_one():
    one = learned()
    for found in on_processes(2, learned):
        for a, b in zip(one, found, strict=True):
            near(a, b, atol=1e-10)


def test_cma_starts_from_what_avid_ended_with(tiny, tmp_path):
    method, data, trainer = tiny("avid", "trainer.max_epochs=1")
    trainer.fit(method, data)
    trainer.save_checkpoint(tmp_path / "avid.ckpt")
    after, data, trainer = tiny("avid_cma", f"method.source.path={tmp_path / 'avid.ckpt'}")
    data.setup("fit")
    after.seed = data.seed
    after.prepare(data.count, 0)
    for key, value in method.state_dict().items():
        assert torch.equal(after.state_dict()[key], value), key
    after.begin_epoch(0)
    assert after.agrees
    assert torch.equal(
        after.agreement.sets.long(), agreeing(method.video, method.audio, 4, "consensus")
    )
    after, data, trainer = tiny("avid_cma", f"method.source.path={tmp_path / 'avid.ckpt'}")
    trainer.fit(after, data)
    assert after.nce["video"].log_e.isfinite()


def test_a_wrong_source_is_named(tiny, tmp_path):
    method, data, trainer = tiny("avid", "trainer.max_epochs=1", "trainer.max_steps=1")
    trainer.fit(method, data)
    trainer.save_checkpoint(tmp_path / "avid.ckpt")
    source = f"method.source.path={tmp_path / 'avid.ckpt'}"
    for other, words in (
        ("data.limit=48", r"bank has shape \(64, 8\) in the checkpoint and \(48, 8\)"),
        ("backbone.space=4", "other sizes|checkpoint and"),
        ("method.variant=joint", "2 of its parts are missing"),
        ("backbone.hidden=[8,8]", "a run of something else|other sizes"),
    ):
        after, data, trainer = tiny("avid_cma", source, other)
        with pytest.raises(ValueError, match=words):
            trainer.fit(after, data)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        ended(str(tmp_path / "plain.pt"))
    assert ended(None) is None


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="variant must be one of cross"):
        method("crossed")
    with pytest.raises(ValueError, match="negatives must be at least 1"):
        method(negatives=0)
    with pytest.raises(ValueError, match="negatives must be at least 5"):
        method("cross", {"alone": 1}, negatives=4)
    with pytest.raises(ValueError, match="backbone=audio_video"):
        AVID(Deaf(), nn.Identity(), None)
    for bad in ({"positives": 0}, {"negatives": 0}, {"every_n_epochs": 0}, {"alone": 0}):
        with pytest.raises(ValueError, match=f"agreement.{next(iter(bad))}"):
            Agreement(**bad)
    with pytest.raises(ValueError, match="by must be"):
        Agreement(by="nobody")
    with pytest.raises(ValueError, match="the training set has 20"):
        Agreement(positives=19).prepare(20)
    with pytest.raises(ValueError, match="temperature"):
        BankNCE(0.0)
