"""PIRL: what its equations, its two readings of NCE and its transforms promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from processes import mean, on_processes
from test_papers import batch_of
from torch import nn

from unlabeled.augment.pirl import PatchesOfImage, RotationOfImage
from unlabeled.dist import mine
from unlabeled.draws import Draws
from unlabeled.methods.npid import NPID
from unlabeled.methods.pirl import PIRL

N, D, T = 20, 6, 4
FORMS = ("paper", "softmax", "binary")


class Flat(nn.Module):
    """A backbone for images of any size, without batch norm, that remembers its inputs."""

    dim = 5

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x)
        return self.layer(x.mean((2, 3))).tanh()


def pirl(**given):
    torch.manual_seed(0)
    settings = {"dim": D, "tiles": T, "negatives": 16, "temperature": 0.3, **given}
    method = PIRL(Flat(), nn.Identity(), None, **settings)
    method.prepare(N, 0)
    return method.double()


def batches(tiles=T, count=12, steps=2):
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for step in range(steps):
        other = noise(count, tiles, 3, 2, 2) if tiles else noise(count, 3, 4, 4)
        index = (torch.arange(count) * 3 + step) % N
        yield {"views": [noise(count, 3, 4, 4), other], "index": index, "step": step}


def one(tiles=T):
    return next(batches(tiles))


def units(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_the_loss_is_equation_5_by_hand():
    method, batch = pirl(lambd=0.3), one()
    memory = method.memory.bank.clone()
    terms = method.loss(batch)
    image, other = batch["views"]
    v = F.normalize(method.f(method.backbone(image)), dim=1)
    g = [method.g_tile(method.backbone(other[:, i])) for i in range(T)]
    vt = F.normalize(method.g(torch.cat(g, 1)), dim=1)

    def nce(x, purpose):
        rows, total = Draws(0, purpose, 0).integers(N, 16)[0].tolist(), 0.0
        for i, row in zip(batch["index"].tolist(), x, strict=True):
            others = [math.exp((row @ memory[j]).item() / 0.3) for j in rows if j != i]
            positive, s = math.exp((row @ memory[i]).item() / 0.3), sum(others)
            total -= math.log(positive / (positive + s))
            total -= sum(math.log(1 - o / (o + s)) for o in others)
        return total / len(x)

    assert terms["original"].item() == pytest.approx(0.7 * nce(v, "negatives"), rel=1e-10)
    expected = 0.3 * nce(vt, "transformed negatives")
    assert terms["transformed"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("form", "k"), [("softmax", 16), ("binary", 16), ("softmax", 0)])
@pytest.mark.parametrize("tiles", [T, 0])
def test_lambda_0_is_npid_bit_for_bit(form, k, tiles):
    method = pirl(lambd=0.0, nce=form, negatives=k, reappear=True, tiles=tiles)
    torch.manual_seed(0)
    alike = {"dim": D, "nce": form, "negatives": k, "temperature": 0.3, "reappear": True}
    npid = NPID(Flat(), nn.Identity(), None, **alike, proximal=0.0)
    npid.prepare(N, 0)
    npid = npid.double()
    npid.backbone.load_state_dict(method.backbone.state_dict())
    npid.f.load_state_dict(method.f.state_dict())
    for batch in batches(tiles):
        method.step = npid.step = batch["step"]
        losses = []
        for m, views in ((method, batch["views"]), (npid, batch["views"][:1])):
            m.zero_grad()
            terms = m.loss({**batch, "views": views})
            losses.append(torch.stack(list(terms.values())).sum())
            losses[-1].backward()
        assert torch.equal(*losses)
        assert torch.equal(method.memory.bank, npid.memory.bank)
        ours = [*method.backbone.parameters(), *method.f.parameters()]
        for p, q in zip(ours, [*npid.backbone.parameters(), *npid.f.parameters()], strict=True):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("form", FORMS)
def test_lambda_1_is_the_transformed_branch_alone(form):
    method, batch = pirl(lambd=1.0, nce=form), one()
    terms = method.loss(batch)
    assert terms["original"].item() == 0
    sum(terms.values()).backward()
    assert all((p.grad == 0).all() for p in method.f.parameters())
    assert all((p.grad != 0).any() for p in [*method.g.parameters(), *method.g_tile.parameters()])
    other = pirl(lambd=1.0, nce=form)
    moved = {**batch, "views": [batch["views"][0] + 1, batch["views"][1]]}
    assert torch.equal(other.loss(moved)["transformed"], terms["transformed"])


def test_g_hears_the_order_by_its_last_layer_only():
    method, (_, tiles) = pirl(), one()["views"]
    turned = tiles[:, [2, 0, 3, 1]]

    def g(tiles):
        return method.g(method.g_tile(method.backbone(method.parts(tiles))).view(len(tiles), -1))

    with torch.no_grad():
        assert (g(tiles) - g(turned)).abs().max() > 0.01
        last = method.g[0]
        last.weight.copy_(last.weight[:, :D].repeat(1, T) / T)  # the concatenation becomes a sum
        torch.testing.assert_close(g(tiles), g(turned))


def test_patch_i_of_image_b_is_row_t_b_plus_i():
    method, batch = pirl(), one()
    tiles, shapes = batch["views"][1], []
    method.g.register_forward_hook(lambda module, given, out: shapes.append(given[0].shape))
    method.loss(batch)
    _, rows = method.backbone.inputs
    assert rows.shape == (12 * T, 3, 2, 2)
    assert all(torch.equal(rows[T * b + i], tiles[b, i]) for b in range(12) for i in range(T))
    assert shapes == [(12, T * D)]


def test_the_bank_follows_the_untransformed_image_alone():
    banks = []
    for change in (0.0, 5.0):
        method, batch = pirl(), one()
        batch["views"][1] = batch["views"][1] + change
        before = method.memory.bank.clone()
        method.loss(batch)
        banks.append(method.memory.bank.clone())
        index = batch["index"]
        v = F.normalize(method.f(method.backbone(batch["views"][0])), dim=1)
        expected = F.normalize(0.5 * before[index] + 0.5 * v, dim=1)
        torch.testing.assert_close(method.memory.bank[index], expected)
        rest = [i for i in range(N) if i not in index.tolist()]
        assert torch.equal(method.memory.bank[rest], before[rest])
    assert torch.equal(*banks)


@pytest.mark.parametrize("form", FORMS)
def test_lengths_of_embeddings_do_not_matter(form):
    method, batch = pirl(nce=form), one()
    first = {k: v.item() for k, v in method.loss(batch).items()}
    method = pirl(nce=form)
    with torch.no_grad():
        for part in (method.f, method.g):
            part[0].weight.mul_(7.3)
            part[0].bias.mul_(7.3)
    for name, value in method.loss(batch).items():
        assert value.item() == pytest.approx(first[name], rel=1e-10)


@pytest.mark.parametrize("k", [32, 1024])
def test_equal_scores_have_known_losses(k):
    batch = one()
    batch["views"] = [x[:1].expand_as(x) for x in batch["views"]]  # one image, one Z
    known = {
        "binary": math.log(k + 1) + k * math.log(1 + 1 / k),
        "paper": math.log(k + 1) + k * math.log(1 + 1 / k),
        "softmax": math.log(k + 1),
    }
    for form, expected in known.items():
        method = pirl(nce=form, negatives=k, reappear=True)
        method.memory.bank.copy_(units(1, D).expand(N, D))
        terms = method.loss(batch)
        for value in terms.values():
            assert value.item() == pytest.approx(expected / 2, rel=1e-10)


def test_the_image_itself_is_a_negative_in_the_official_reading_only():
    values = {}
    for reappear in (False, True):
        method, batch = pirl(nce="softmax", negatives=300, reappear=reappear), one()
        with torch.no_grad():  # images that are their own memories
            v = F.normalize(method.f(method.backbone(batch["views"][0])), dim=1)
        method.memory.bank[batch["index"]] = v
        values[reappear] = method.loss(batch)["original"].item()
    assert values[True] > values[False] + 0.01


def test_both_branches_may_share_their_negatives():
    same = {}
    for shared in (True, False):
        method, batch = pirl(shared_negatives=shared, tiles=0), one(0)
        method.g_tile.load_state_dict(method.f.state_dict())
        batch["views"][1] = batch["views"][0]  # both branches compute the same embedding
        terms = method.loss(batch)
        same[shared] = torch.equal(terms["transformed"], terms["original"])
    assert same == {True: True, False: False}


def test_each_image_may_draw_negatives_of_its_own():
    method, batch = pirl(nce="softmax", per_image=True, reappear=True, lambd=0.0), one()
    method.step = batch["step"]
    v = F.normalize(method.f(method.backbone(batch["views"][0])), dim=1)
    rows = method.draws("negatives", len(v)).integers(N, 16)
    assert (rows != rows[0]).any()
    bank, expected = method.memory.bank.clone(), 0.0
    for i, index in enumerate(batch["index"].tolist()):
        scores = torch.cat([(v[i] @ bank[index])[None], bank[rows[i]] @ v[i]]) / 0.3
        expected -= scores.log_softmax(0)[0] / len(v)
    torch.testing.assert_close(method.loss(batch)["original"], expected)


def test_each_branch_has_a_normaliser_that_the_first_batch_fixes():
    method = pirl(nce="binary")
    assert method.nce.log_z.isnan().all()
    first, second = batches()
    method.loss(first)
    fixed = method.nce.log_z.clone()
    assert fixed.isfinite().all()
    assert fixed[0] != fixed[1]
    method.step = 1
    method.loss(second)
    assert torch.equal(method.nce.log_z, fixed)
    assert "nce.log_z" in method.state_dict()


def test_parameters_do_not_depend_on_the_number_of_orders(tiny):
    counts = [
        sum(p.numel() for p in tiny("pirl", f"method.augment.permutations={n}")[0].parameters())
        for n in (2, 24, "null")
    ]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("name", ["pirl", "pirl_mlp", "pirl_jigsaw_rotation"])
def test_orders_come_from_all_of_9_factorial(compose, name):
    augment = instantiate(compose(f"method={name}").method.augment)
    assert augment.permutations is None
    orders = augment._orders(Draws(0, "order", rows=20000), torch.zeros(0))
    assert torch.equal(orders.sort(1).values, torch.arange(9).expand(20000, 9))
    # 20000 draws out of 362 880 repeat themselves 541 times, give or take 23
    distinct = len(orders.unique(dim=0))
    assert 19350 < distinct < 19570
    for slot in range(9):  # each tile in each slot equally often
        assert ((orders[:, slot].bincount(minlength=9) / (20000 / 9) - 1).abs() < 0.1).all()


def test_methods_come_with_their_transforms(compose):
    kinds = {}
    for name in ("pirl", "pirl_mlp", "pirl_rotation", "pirl_jigsaw_rotation"):
        cfg = compose(f"method={name}", "data=imagenet", "data.root=x")
        augment = instantiate(cfg.method.augment)
        sizes = [x.shape[-1] for x in instantiate(cfg.decode)(_image(), 0)]
        kinds[name] = (type(augment), getattr(augment, "rotate", None), sizes, cfg.method.tiles)
    jigsaw = (PatchesOfImage, False, [224, 255], 9)
    assert kinds == {
        "pirl": jigsaw,
        "pirl_mlp": jigsaw,
        "pirl_rotation": (RotationOfImage, None, [224, 224], 0),
        "pirl_jigsaw_rotation": (PatchesOfImage, True, [224, 255], 9),
    }


def _image():
    return torch.zeros(3, 280, 300, dtype=torch.uint8)


def test_the_recipes_are_the_published_ones(compose):
    def made(name):
        return instantiate(compose(f"method={name}", "backbone=resnet50").method)

    method = made("pirl")
    nce = method.nce
    assert (nce.form, nce.negatives, nce.temperature, nce.reappear) == ("paper", 32000, 0.07, False)
    assert (method.lambd, method.momentum) == (0.5, 0.5)
    assert [tuple(p.shape) for p in (method.f[0].weight, method.g_tile[0].weight)] == [
        (128, 2048)
    ] * 2
    assert tuple(method.g[0].weight.shape) == (128, 1152)
    assert not method.optim.decay_all
    assert 1024 / 256 * method.optim.lr == pytest.approx(0.12)
    assert method.optim.factor(1.0) * 0.12 == pytest.approx(1.2e-4)
    mlp = made("pirl_mlp")
    for head in (mlp.f, mlp.g_tile):
        assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
        assert [tuple(p.shape) for p in head.parameters() if p.ndim > 1] == [
            (2048, 2048),
            (128, 2048),
        ]
    assert tuple(mlp.g[0].weight.shape) == (128, 1152)
    assert (mlp.nce.form, mlp.nce.temperature) == ("softmax", 0.1)


def test_views_and_tiles_must_agree():
    for tiles, views in ((T, 0), (0, T), (T, T + 1)):
        with pytest.raises(ValueError, match=f"tiles={tiles} for views of shape"):
            pirl(tiles=tiles).loss(one(views))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("method.lambd=2", "lambd"),
        ("method.nce=other", "nce"),
        ("method.tiles=-1", "tiles"),
        ("method.temperature=0", "temperature"),
        ("method.negatives=0", "negatives"),
        ("method.norm=layer", "norm"),
    ],
)
def test_bad_values_are_named(tiny, override, word):
    with pytest.raises(InstantiationException, match=word):
        tiny("pirl", "method.nce=paper", override)


def test_the_image_branch_trains_on_its_own_batch_statistics(tiny):
    """Tiles go through the trunk in a forward of their own: other sizes, other statistics."""
    method, *rest = tiny("pirl", "method.norm=none")
    batch = batch_of(method, *rest)
    sizes = []
    method.backbone.register_forward_hook(lambda m, given, out: sizes.append(given[0].shape[0]))
    method.loss(batch)
    assert sizes == [16, 16 * method.tiles]


def test_an_image_and_its_rotation_may_share_a_forward():
    inputs, losses = [], []
    for joint in (True, False):
        method = pirl(tiles=0, joint=joint)
        losses.append(sum(method.loss(one(0)).values()))  # this trunk has no batch norm
        inputs.append([len(x) for x in method.backbone.inputs])
    assert inputs == [[24], [12, 12]]
    torch.testing.assert_close(*losses)


# Two and three processes against one.

SETTINGS = [
    ("paper", 16, T, False),
    ("softmax", 16, 0, True),
    ("binary", 16, T, False),
    ("softmax", 0, T, False),
]


def train(form, negatives, tiles, per_image):
    """Two updates by gradient descent, shared by all processes: losses, weights, bank and Z."""
    given = {"nce": form, "negatives": negatives, "tiles": tiles, "per_image": per_image}
    method = pirl(lambd=0.4, **given)
    losses = []
    for batch in batches(tiles):
        method.step = batch["step"]
        given = {"views": [mine(x) for x in batch["views"]], "index": mine(batch["index"])}
        loss = sum(method.loss(given).values())
        method.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in method.parameters():
                p -= 0.1 * mean(p.grad)
        losses.append(mean(loss))
    return {"losses": torch.stack(losses), **method.state_dict()}


def runs():
    return [train(*settings) for settings in SETTINGS]


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_like_one(world):
    alone = runs()
    assert ["nce.log_z" in state for state in alone] == [False, False, True, False]
    for found in on_processes(world, runs):
        torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-9)
