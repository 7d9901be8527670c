"""DINO: its loss as loops, its pairs, centre, schedules and networks, and its backbones."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CONF, small
from hydra.utils import instantiate
from omegaconf import OmegaConf
from processes import on_processes, value_and_gradient
from test_papers import batch_of
from torch import nn

from unlabeled.backbones import load
from unlabeled.backbones.library import timm
from unlabeled.dist import mine
from unlabeled.draws import Draws
from unlabeled.methods.dino import DINO, dino_loss
from unlabeled.optim import Optim
from unlabeled.parts.dino_head import Head, WeightNormed
from unlabeled.parts.drop_path import DropPath, drop_path_in, feed
from unlabeled.parts.mlp import mlp

VIT = ["backbone=vit_tiny_small_image", "method.norm=none", "trainer.max_steps=4"]
VIT += ["decode.parts.global.size=16", "decode.parts.local.size=8", "data.limit=32"]


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def logits(count, rows=3, k=7, seed=0):
    return list(normals(count, rows, k, seed=seed))


def literal(teacher, student, centre, tau_t, tau_s):
    """Mean of the terms, and how many there are."""
    terms = []
    for a, t in enumerate(teacher):
        for v, s in enumerate(student):
            if v == a:
                continue
            for i in range(len(t)):
                top = [math.exp((x - c) / tau_t) for x, c in zip(t[i], centre, strict=True)]
                low = [math.exp(x / tau_s) for x in s[i]]
                p_t, p_s = ([x / sum(y) for x in y] for y in (top, low))
                terms.append(-sum(p * math.log(q) for p, q in zip(p_t, p_s, strict=True)))
    return sum(terms) / len(terms), len(terms) // len(teacher[0])


# The loss


def test_is_its_formula_with_18_terms():
    teacher, student = logits(2), logits(10, seed=1)
    centre = normals(7, seed=2)
    expected, terms = literal(teacher, student, centre, 0.4, 0.3)
    assert terms == 18
    loss = dino_loss(teacher, student, centre, 0.4, 0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("crops", [2, 3, 10])
def test_a_crop_is_never_compared_with_itself(crops):
    # The student's logits of crop v reach the loss with the codes of all global crops but v.
    teacher = logits(2)
    student = [x.requires_grad_() for x in logits(crops, seed=1)]
    dino_loss(teacher, student, torch.zeros(7), 0.1, 0.1).backward()
    codes = [(t / 0.1).softmax(1) for t in teacher]
    pairs = 2 * crops - 2
    for v, s in enumerate(student):
        seen = [q for a, q in enumerate(codes) if a != v]
        p = (s.detach() / 0.1).softmax(1)
        expected = sum(p - q for q in seen) / 0.1 / len(s) / pairs
        torch.testing.assert_close(s.grad, expected)


@pytest.mark.parametrize("k", [10, 1000])
def test_uniform_outputs_cost_the_logarithm_of_their_number(k):
    same = [torch.full((4, k), 3.0, dtype=torch.float64)] * 10
    loss = dino_loss(same[:2], same, torch.zeros(k), 0.04, 0.1)
    assert loss.item() == pytest.approx(math.log(k), rel=1e-12)


def test_the_centre_takes_a_constant_vector_off_the_teacher():
    teacher, student, c = logits(2), logits(4, seed=1), normals(7, seed=2)
    shift = normals(7, seed=3) * 5
    loss = dino_loss(teacher, student, c, 0.1, 0.1)
    moved = dino_loss([t + shift for t in teacher], student, c + shift, 0.1, 0.1)
    torch.testing.assert_close(moved, loss)
    assert not torch.isclose(dino_loss(teacher, student, c + shift, 0.1, 0.1), loss)


def test_no_gradient_reaches_teacher_or_centre():
    teacher = [x.requires_grad_() for x in logits(2)]
    student = [x.requires_grad_() for x in logits(4, seed=1)]
    centre = normals(7, seed=2).requires_grad_()
    dino_loss(teacher, student, centre, 0.1, 0.1).backward()
    assert all(x.grad is None for x in [*teacher, centre])
    assert all(x.grad.abs().max() > 0 for x in student)


def test_half_precision_is_exponentiated_in_full():
    teacher, student = ([x.bfloat16() * 9 for x in logits(n, seed=n)] for n in (2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dino_loss(teacher, student, torch.zeros(7), 0.04, 0.1)
    exact = [x.double() for x in teacher], [x.double() for x in student]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dino_loss(*exact, torch.zeros(7), 0.04, 0.1).item(), 1e-5)


# The head


def test_the_head_is_the_papers():
    head = Head(5, 8, 4, 9, norm="none", fixed=True)
    kinds = [type(layer).__name__ for layer in head.mlp]
    assert kinds == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    x = normals(6, 5).float()
    torch.testing.assert_close(head.embed(x).norm(dim=1), torch.ones(6))
    rows = head.last.weight / head.last.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(x), head.embed(x) @ rows.T)
    assert head(x).abs().max() <= 1  # cosines
    assert [type(m).__name__ for m in Head(5, 8, 4, 9, norm="batch", fixed=True).mlp][1] == (
        "BatchNorm1d"
    )


def test_the_last_layers_norms_stay_or_are_learned():
    z = normals(3, 4).float()
    for fixed in (True, False):
        layer = WeightNormed(4, 6, fixed=fixed)
        layer(z).square().sum().backward()
        assert (layer.scale.grad is None) == fixed
        # The gradient turns a row and never stretches it.
        along = (layer.weight.grad * layer.weight).sum(1)
        torch.testing.assert_close(along, torch.zeros(6), atol=1e-5, rtol=0)
    with torch.no_grad():
        before = layer(z)
        layer.weight.mul_(7)
    torch.testing.assert_close(layer(z), before)


def test_activations_of_a_head_are_named():
    with pytest.raises(ValueError, match="activation must be relu or gelu, got 'tanh'"):
        mlp(2, 3, 4, activation="tanh")


# The method


def test_global_crops_meet_their_own_places_when_sizes_are_grouped(tiny):
    method, *rest = tiny("dino")
    batch = batch_of(method, *rest)
    sizes = [v.shape[-1] for v in batch["views"]]
    assert sizes == [32, 32, 16, 16]
    method.networks[0].eval(), method.networks[1].eval()
    method.head.eval(), method.teacher_head.eval()
    method._total_steps, method.warmup = 1, 0
    loss = method.loss(batch)["distillation"].item()
    with torch.no_grad():  # one by one
        student = [method.head(method.networks[0](v)) for v in batch["views"]]
        teacher = [method.teacher_head(method.networks[1](v)) for v in batch["views"][:2]]
        zero = torch.zeros(method.centre.shape)
        expected = dino_loss(teacher, student, zero, method.tau_t, method.tau_s).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_one_forward_per_resolution(tiny):
    method, *rest = tiny("dino")
    batch = batch_of(method, *rest)
    method._total_steps = 1
    shapes = {0: [], 1: []}
    for i, network in enumerate(method.networks):
        network.register_forward_pre_hook(lambda _, x, i=i: shapes[i].append(tuple(x[0].shape)))
    method.loss(batch)
    assert shapes[0] == [(32, 3, 32, 32), (32, 3, 16, 16)]
    assert shapes[1] == [(32, 3, 32, 32)]  # global crops only


def test_the_centre_is_a_moving_average_of_the_teachers_mean(tiny):
    method, *rest = tiny("dino", "method.centre_momentum=0.9")
    batch = batch_of(method, *rest)
    method._total_steps = 1
    assert "centre" in dict(method.named_buffers())
    assert "centre" in method.state_dict()
    method.centre.copy_(torch.linspace(-1, 1, len(method.centre)))
    before = method.centre.clone()
    seen = []
    method.teacher_head.register_forward_hook(lambda _, x, y: seen.append(y.detach()))
    method.loss(batch)
    (t,) = seen
    assert len(t) == 32
    torch.testing.assert_close(method.centre, 0.9 * before + 0.1 * t.mean(0))


@pytest.mark.parametrize("evaluate", ["teacher", "student"])
def test_the_teacher_has_no_gradient_and_moves_by_its_momentum(tiny, evaluate):
    method, data, trainer = tiny("dino", "trainer.max_steps=2", f"method.evaluate={evaluate}")
    student, teacher = method.networks
    assert (teacher is method.backbone) == (evaluate == "teacher")
    slow = [*teacher.parameters(), *method.teacher_head.parameters()]
    fast = [*student.parameters(), *method.head.parameters()]
    assert [torch.equal(a, b) for a, b in zip(slow, fast, strict=True)] == [True] * len(slow)
    assert not any(p.requires_grad for p in slow)
    expected, moments, own = [p.clone() for p in slow], [], method.after_step

    def after_step():
        m = 1 - (1 - method.momentum) * (1 + math.cos(math.pi * method.progress)) / 2
        moments.append(m)
        for old, theta in zip(expected, fast, strict=True):
            old.copy_(m * old + (1 - m) * theta.detach())
        own()

    method.after_step = after_step
    trainer.fit(method, data)
    for p, right in zip(slow, expected, strict=True):
        assert p.grad is None
        torch.testing.assert_close(p.detach(), right, rtol=1e-5, atol=1e-7)
    assert len(moments) == 2
    assert method.momentum <= moments[0] < moments[1]


def test_the_teachers_temperature_rises_and_stays(tiny, monkeypatch):
    import unlabeled.methods.dino as module

    seen = []

    def spy(teacher, student, centre, tau_t, tau_s):
        seen.append(tau_t)
        return dino_loss(teacher, student, centre, tau_t, tau_s)

    monkeypatch.setattr(module, "dino_loss", spy)
    lines = ["method.warmup=0.5", "method.tau_t_start=0.04", "method.tau_t=0.08"]
    method, data, trainer = tiny("dino", *lines)
    trainer.fit(method, data)
    assert seen == pytest.approx([0.04, 0.05, 0.06, 0.07, *[0.08] * 4])


def test_the_last_layer_rests_while_frozen(tiny):
    method, data, trainer = tiny("dino", "method.freeze=0.5")
    start = method.head.last.weight.detach().clone()
    seen = []
    method.on_train_batch_end = lambda *_: seen.append(method.head.last.weight.detach().clone())
    trainer.fit(method, data)
    assert [torch.equal(w, start) for w in seen] == [True] * 4 + [False] * 4


def test_weight_decay_moves_along_a_cosine_and_spares_biases_and_norms(tiny):
    lines = ["method.optim.weight_decay=0.04", "method.optim.weight_decay_end=0.4"]
    method, data, trainer = tiny("dino", *lines)
    seen = []
    method.on_train_batch_end = lambda *_: seen.append(
        sorted(
            (g["weight_decay"], g["params"][0].ndim > 1) for g in method.optimizers().param_groups
        )
    )
    trainer.fit(method, data)
    for k, groups in enumerate(seen):
        now = 0.4 - 0.36 * (1 + math.cos(math.pi * k / 8)) / 2
        assert groups == [(0.0, False), (pytest.approx(now), True)]
    decayed = {id(p) for g in method.optimizers().param_groups if g["adapt"] for p in g["params"]}
    for name, p in method.named_parameters():
        if p.requires_grad:
            assert (id(p) in decayed) == (p.ndim > 1), name


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_vision_transformer_trains_and_resumes_bit_for_bit(compose, tmp_path, drop):
    def fit(until=None, checkpoint=None, seed=0):
        lines = [line for line in small("dino") if not line.startswith("backbone")]
        cfg = compose(*lines, *VIT, f"method.drop_path={drop}")
        torch.manual_seed(seed)  # what the global generator holds must not matter to a resumed run
        plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        method, data = instantiate(cfg.method), instantiate(cfg.data)
        trainer = instantiate(cfg.trainer, precision="32-true", **plain)
        if until:

            def stop(*_):
                if trainer.global_step == until:
                    trainer.save_checkpoint(tmp_path / "half.ckpt")
                    raise KeyboardInterrupt

            method.on_train_batch_end = stop
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                trainer.fit(method, data)
        else:
            trainer.fit(method, data, ckpt_path=checkpoint, weights_only=True)
        return method

    whole = fit().state_dict()
    fit(until=3)
    resumed = fit(checkpoint=tmp_path / "half.ckpt", seed=99).state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tau_s": 0.0}, "tau_s=0.0"),
        ({"tau_t_start": -1.0}, "tau_t_start=-1.0"),
        ({"momentum": 2.0}, "momentum=2.0"),
        ({"centre_momentum": -0.5}, "centre_momentum=-0.5"),
        ({"evaluate": "both"}, "evaluate must be teacher or student, got 'both'"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
        ({"drop_path": 0.1}, "Linear has none: set drop_path=0"),
    ],
)
def test_bad_values_are_named(options, word):
    backbone = nn.Linear(3, 4)
    backbone.dim = 4
    with pytest.raises(ValueError, match=word):
        DINO(backbone, nn.Identity(), None, outputs=4, hidden=4, bottleneck=2, **options)


# Recipes


def test_the_recipe_is_the_papers(compose):
    cfg = compose("experiment=imagenet/dino")
    crops = {
        name: (p["size"], p["count"], list(p["scale"])) for name, p in cfg.decode.parts.items()
    }
    assert crops == {"global": (224, 2, [0.4, 1.0]), "local": (96, 8, [0.05, 0.4])}
    assert {p.interpolation for p in cfg.decode.parts.values()} == {"bicubic"}
    chains = cfg.method.augment.chains
    assert {name: c.blur.p for name, c in chains.items()} == dict(first=1.0, second=0.1, local=0.5)
    assert {n: c.solarize.p for n, c in chains.items() if "solarize" in c} == {"second": 0.2}
    assert list(cfg.method.augment.repeat) == [1, 1, 8]
    optim = cfg.method.optim
    assert (optim.lr, optim.weight_decay, optim.weight_decay_end) == (5e-4, 0.04, 0.4)
    assert cfg.trainer.gradient_clip_val == 3
    assert cfg.method.warmup * cfg.trainer.max_epochs == 30
    assert cfg.method.freeze * cfg.trainer.max_epochs == 1


# Stochastic depth


class Branches(nn.Module):
    """Two blocks like timm's."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.drop_path1, block.drop_path2 = nn.Identity(), nn.Identity()


def test_stochastic_depth_grows_with_depth():
    net = Branches()
    drop_path_in(net, 0.2)
    found = [m for m in net.modules() if isinstance(m, DropPath)]
    assert [m.p for m in found] == [0.0, 0.0, 0.2, 0.2]
    assert len({m.place for m in found}) == 4
    assert not net.state_dict()


def test_stochastic_depth_is_a_function_of_step_row_view_place_and_call():
    def masks(rows=8, first=0, world=1, step=0, place=0, calls=1, views=2):
        drop = DropPath(0.5, place)
        shell = nn.Sequential(drop)
        feed(shell, Draws(0, "drop", step, rows=rows, rank=first, world=world))
        return [drop(torch.ones(rows * views, 3)) for _ in range(calls)][-1]

    whole = masks()
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(whole, masks())  # nothing else moved the generator
    for other in (masks(step=1), masks(place=1), masks(calls=2)):
        assert not torch.equal(whole, other)
    halves = [masks(rows=4, first=r, world=2).view(2, 4, 3) for r in range(2)]
    torch.testing.assert_close(torch.cat(halves, 1).flatten(0, 1), whole)
    assert not torch.equal(whole[:8], whole[8:])  # views of an image differ


def test_stochastic_depth_keeps_the_mean_and_sleeps_in_evaluation():
    drop = DropPath(0.25, 0)
    x = torch.ones(20000, 1)
    assert torch.equal(drop(x), x)  # before it is fed
    feed(drop, Draws(0, "drop", rows=20000))
    assert drop(x).mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(x), x)


# Vision transformers


def small_vit():
    return timm("vit_tiny_patch16_224", image_size=32, patch_size=4, dynamic=True)


def test_positional_embeddings_are_interpolated_for_small_crops():
    vit = small_vit().eval()
    for side in (8, 20, 32, 48):
        assert vit(torch.randn(2, 3, side, side)).shape == (2, 192) == (2, vit.dim)
    # Position matters for a small crop too: without its embeddings the order of patches would not.
    x = torch.randn(1, 3, 20, 20)
    turned = x.roll(4, dims=-1)
    assert not torch.allclose(vit(x), vit(turned), atol=1e-4)
    grid = vit.model.pos_embed[:, 1:].unflatten(1, (8, 8)).movedim(3, 1)
    small = F.interpolate(grid, (5, 5), mode="bicubic", antialias=True, align_corners=False)
    seen = []
    vit.model.norm_pre.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    vit.model(torch.zeros(1, 3, 20, 20))
    patch = vit.model.patch_embed.proj.bias  # zero images: the patches' bias alone
    torch.testing.assert_close(seen[0][:, 1:], small.flatten(2).mT + patch, rtol=1e-4, atol=1e-5)


def test_other_sizes_are_refused_unless_asked_for():
    fixed = timm("vit_tiny_patch16_224", image_size=32, patch_size=4)
    with pytest.raises(ValueError, match="height"):
        fixed(torch.zeros(1, 3, 20, 20))
    for setting in ({"patch_size": 4}, {"dynamic": True}, {"depth": 2}, {"pool": "avg"}):
        with pytest.raises(ValueError, match=f"leave out {next(iter(setting))}"):
            timm("resnet18", **setting)


def test_stages_of_a_vision_transformer_are_its_blocks():
    vit = small_vit().eval()
    x = torch.randn(2, 3, 20, 20)
    stages = vit.stages(x)
    assert list(stages) == [*(f"stage{i}" for i in range(1, 13)), "head"]
    assert all(stages[f"stage{i}"].shape == (2, 192, 5, 5) for i in range(1, 13))
    torch.testing.assert_close(stages["head"].flatten(1), vit(x))


def test_a_vision_transformer_may_be_narrow_and_give_the_mean_of_its_patches():
    size = dict(dim=24, depth=2, heads=3)
    vit = timm("vit_tiny_patch16_224", image_size=32, patch_size=4, **size, pool="avg").eval()
    x = torch.randn(2, 3, 32, 32)
    assert (vit.dim, len(vit.model.blocks), vit.model.blocks[0].attn.num_heads) == (24, 2, 3)
    tokens = vit.model.forward_features(
        vit.to_own(x)
    )  # behind the last norm, as MAE's decoder reads them
    torch.testing.assert_close(tokens.mean(2), torch.zeros(2, 65))
    torch.testing.assert_close(vit(x), tokens[:, 1:].mean(1))
    again = load.fresh(vit.config)
    again.load_state_dict(vit.state_dict())
    torch.testing.assert_close(again.eval()(x), vit(x))
    for wrong, said in (
        ({"dim": 25}, "divisible"),
        ({"depth": 0}, "depth must be"),
        ({"pool": "max"}, "pool"),
    ):
        with pytest.raises(ValueError, match=said):
            timm("vit_tiny_patch16_224", **{**size, **wrong})  # type: ignore[arg-type]


def test_a_vision_transformer_comes_back_from_its_configuration():
    vit = small_vit()
    assert vit.config["patch_size"] == 4
    assert vit.config["dynamic"] is True
    again = load.fresh(vit.config)
    assert again(torch.zeros(1, 3, 20, 20)).shape == (1, 192)
    assert again.state_dict().keys() == vit.state_dict().keys()
    assert "patch_size" not in timm("vit_tiny_patch16_224", image_size=32).config


@pytest.mark.parametrize(("name", "dim"), [("vit_small", 384), ("vit_base", 768)])
def test_the_papers_transformers_have_patches_of_16_and_a_class_token(name, dim):
    node = OmegaConf.load(CONF / f"backbone/{name}.yaml")
    assert node.dynamic
    with torch.device("meta"):
        vit = timm(node.name, dynamic=True)
        assert vit.dim == dim
        assert vit(torch.zeros(2, 3, 96, 96)).shape == (2, dim)
    assert vit.model.patch_embed.patch_size == (16, 16)
    assert vit.model.num_prefix_tokens == 1
    assert len(vit.model.blocks) == 12
    assert not vit.converts  # it takes what all backbones are given


# Processes


class Net(nn.Module):
    """A backbone of one weight matrix, which a test can set, and one residual branch."""

    dim = 6

    def __init__(self):
        super().__init__()
        self.w = normals(5, 6, seed=3)
        self.drop_path1 = DropPath(0.3, 0)

    def forward(self, x):
        return self.drop_path1((x @ self.w).tanh())


def measured():
    """The method's loss, gradient and centre on this process's rows of 12."""
    torch.manual_seed(0)
    sizes = {"outputs": 7, "hidden": 8, "bottleneck": 4}
    method = DINO(Net(), nn.Identity(), None, **sizes, evaluate="student").double()
    method.centre.copy_(normals(7, seed=4))
    views = [mine(x) for x in normals(4, 12, 5)]

    def loss(w):
        method.backbone.w = w
        return method.loss({"views": views})["distillation"]

    found = value_and_gradient(loss, normals(5, 6, seed=3))
    return {**found, "centre": method.centre.clone()}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_are_one(world):
    alone = measured()
    for found in on_processes(world, measured):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


def test_each_gradient_is_clipped_alone(tiny):
    most = 0.05
    lines = [f"method.optim.clip_each={most}", "trainer.gradient_clip_val=null"]
    method, data, trainer = tiny("dino", *lines, "trainer.max_steps=2")
    clip, scaled = method.configure_gradient_clipping, []

    def look(*args, **kwargs):
        trained = [p for p in method.parameters() if p.grad is not None]
        before = [p.grad.clone() for p in trained]
        clip(*args, **kwargs)
        for p, old in zip(trained, before, strict=True):
            norm = old.norm().item()
            torch.testing.assert_close(p.grad, old * (most / norm if norm > most else 1.0))
            scaled.append(norm > most)

    method.configure_gradient_clipping = look
    trainer.fit(method, data)
    assert set(scaled) == {True, False}


def test_a_clip_of_nothing_is_refused():
    with pytest.raises(ValueError, match="clip_each must be positive"):
        Optim(torch.optim.SGD, lr=0.1, clip_each=0.0)
