"""Distillation: its loss and gradient, its teachers, and label smoothing as its simplest form."""

import math

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from processes import on_processes, value_and_gradient
from torch import nn

from unlabeled.backbones import load
from unlabeled.backbones.library import timm, torchvision
from unlabeled.dist import mine
from unlabeled.draws import Draws
from unlabeled.methods.distillation import distillation_loss, smoothing_loss


def logits(rows=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_loss_is_its_formula(temperature):
    s, t, total = logits(), logits(seed=1), 0.0
    for a, b in zip(s.tolist(), t.tolist(), strict=True):
        p, q = ([math.exp(v / temperature) for v in x] for x in (a, b))
        for pk, qk in zip(p, q, strict=True):
            total += qk / sum(q) * math.log(qk / sum(q) / (pk / sum(p)))
    expected = temperature**2 * total / len(s)
    assert distillation_loss(s, t, temperature).item() == pytest.approx(expected, rel=1e-10)


def test_a_student_like_its_teacher_has_no_loss_and_no_gradient():
    s = logits().requires_grad_()
    loss = distillation_loss(s, s.detach() + 7.0, 3.0)  # a shift of all logits says nothing
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert s.grad.abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_t_times_the_difference_of_distributions(temperature):
    s, t = logits().requires_grad_(), logits(seed=1)
    (len(s) * distillation_loss(s, t, temperature)).backward()
    p, q = ((x / temperature).softmax(1) for x in (s.detach(), t))
    torch.testing.assert_close(s.grad, temperature * (p - q))


def test_for_high_temperatures_it_matches_logits():
    """Hinton et al., section 2.1: with zero-mean logits, (s - t)^2 / 2C."""
    s, t = (x - x.mean(1, keepdim=True) for x in (logits(), logits(seed=1)))
    expected = (s - t).square().sum(1).mean() / (2 * s.shape[1])
    torch.testing.assert_close(distillation_loss(s, t, 1e4), expected, rtol=1e-3, atol=0)


def test_chance():
    assert smoothing_loss(torch.zeros(4, 7)).item() == pytest.approx(math.log(7))
    hard = torch.full((4, 7), -1e4)
    hard[:, 2] = 1e4
    assert distillation_loss(torch.zeros(4, 7), hard, 1.0).item() == pytest.approx(math.log(7))


def test_half_precision_is_raised():
    s, t = logits().bfloat16(), logits(seed=1).bfloat16()
    assert distillation_loss(s, t, 4.0).dtype == torch.float32
    torch.testing.assert_close(
        distillation_loss(s, t, 4.0), distillation_loss(s.float(), t.float(), 4.0)
    )


# the method


def first_batch(method, data):
    data.trainer = method._trainer = None
    data.setup("fit")
    method.seed = data.seed
    method.prepare(data.count, len(data.classes))
    method.log = lambda *_: None
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    return method.augment(batch, Draws(0, "augment", 0, rows=len(batch["index"])))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_without_a_teacher_it_is_label_smoothing(tiny, smoothing):
    method, data, _ = tiny("distillation", "method.teacher=null", f"method.smoothing={smoothing}")
    batch = first_batch(method, data)
    loss = sum(method.loss(batch).values())
    s = method.head(method.seen["features"])
    expected = F.cross_entropy(s, batch["label"], label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_hard_labels_have_weight_alpha(tiny, alpha):
    method, data, _ = tiny("distillation", f"method.alpha={alpha}")
    batch = first_batch(method, data)
    terms = method.loss(batch)
    assert set(terms) == ({"soft", "hard"} if alpha else {"soft"})
    s = method.head(method.seen["features"])
    t = method.teacher.network(batch["views"][0])
    expected = (1 - alpha) * 16 * F.kl_div(
        (s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean"
    ) + alpha * F.cross_entropy(s, batch["label"])
    torch.testing.assert_close(sum(terms.values()), expected, atol=1e-5, rtol=1e-4)


def test_labels_are_not_read_unless_asked_for(tiny):
    method, data, _ = tiny("distillation")
    batch = first_batch(method, data)
    del batch["label"]
    assert method.loss(batch)["soft"].isfinite()


def test_the_teacher_rests_and_only_its_record_is_saved(tiny, teacher, tmp_path):
    method, data, trainer = tiny("distillation")
    network = method.teacher.network
    before = {k: v.clone() for k, v in network.state_dict().items()}
    trainer.fit(method, data)
    assert not network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert not [key for key in saved["state_dict"] if "teacher" in key]
    assert saved["teacher"]["path"] == str(teacher)
    assert len(saved["teacher"]["checksum"]) == 32


def test_a_run_does_not_go_on_with_another_teacher(tiny, teacher, tmp_path):
    method, data, trainer = tiny("distillation", "trainer.max_steps=1")
    trainer.fit(method, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    changed = torch.load(teacher, weights_only=True)
    changed["state_dict"]["head.bias"] += 1
    torch.save(changed, tmp_path / "other.ckpt")
    other = f"method.teacher.path={tmp_path / 'other.ckpt'}"
    method, data, trainer = tiny("distillation", other)
    with pytest.raises(ValueError, match="the run had another teacher"):
        trainer.fit(method, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)


# teachers


def test_a_classifier_is_a_runs_backbone_and_head(teacher):
    torch.manual_seed(0)
    net, content = load.classifier(str(teacher)).eval(), torch.load(teacher, weights_only=True)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)  # the student begins as without a teacher
    state = content["state_dict"]
    assert net.dim == 10
    x = torch.randn(3, 3, 16, 16)
    plain = load.checkpoint(str(teacher)).eval()
    expected = plain(x) @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net.stages(x)["res5"], plain.stages(x)["res5"])
    assert load.fresh(net.config).dim == 10


def test_a_run_without_a_classifier_is_refused(source):
    with pytest.raises(ValueError, match=r"no linear classifier .* method=supervised"):
        load.classifier(str(source))


def test_library_models_keep_their_logits():
    net = torchvision("resnet18", logits=True)
    assert net.dim == 1000
    assert isinstance(net.model.fc, nn.Linear)
    assert load.fresh(net.config).dim == 1000
    assert torchvision("resnet18").dim == 512
    assert "logits" not in torchvision("resnet18").config
    small = timm("test_resnet", logits=True)
    assert small.dim == 1000
    assert load.fresh(small.config).dim == 1000
    with torch.no_grad():
        assert small.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


def test_a_librarys_classifier_teaches_its_own_classes(tiny, compose):
    lines = ["method=distillation", "backbone@method.teacher=timm", "backbone.width=16"]
    lines += ["method.teacher.name=test_resnet"]
    method = instantiate(compose(*lines, "method.teacher.logits=true").method)
    method.prepare(64, 10)
    assert method.head.out_features == 1000
    with pytest.raises(InstantiationException, match=r"Timm gives features, not logits.*=true"):
        instantiate(compose(*lines).method)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["method.temperature=0"], "temperature must be positive, got 0"),
        (["method.alpha=2"], "alpha must lie in"),
        (["method.smoothing=-1", "method.teacher=null"], "smoothing must lie in"),
        (["method.smoothing=0.1"], "smoothing=0.1 takes the place of alpha"),
        (["method.teacher=null", "method.alpha=0.5"], "alpha=0.5"),
    ],
)
def test_bad_values_are_named(tiny, overrides, word):
    with pytest.raises(InstantiationException, match=word):
        tiny("distillation", *overrides)


def test_labels_must_be_the_teachers_where_they_are_used(tiny):
    method, *_ = tiny("distillation", "method.alpha=0.5")
    with pytest.raises(ValueError, match="teacher knows 10 classes and the data have 3"):
        method.prepare(64, 3)
    with pytest.raises(ValueError, match=r"alpha=0\.5 needs labels"):
        method.prepare(64, 0)
    free, *_ = tiny("distillation")
    free.prepare(64, 0)
    assert free.head.out_features == 10


# several processes


def shared():
    x, t = logits(12, 8), logits(12, 5, seed=2)
    w = torch.linspace(-1, 1, 40, dtype=torch.float64).view(8, 5)
    return value_and_gradient(lambda w: distillation_loss(mine(x) @ w, mine(t), 2.0), w)


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_learn_as_one_does(world):
    alone = shared()
    for found in on_processes(world, shared):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value)
