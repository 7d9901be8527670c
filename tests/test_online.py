"""Online probes: right answers, and a training that does not notice them."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from unlabeled.batch import normalize
from unlabeled.callbacks.online import OnlineKNN, OnlineLinear
from unlabeled.draws import shuffled, subset
from unlabeled.optim import Optim

COLOURS = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220]])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Data(pl.LightningDataModule):
    """Coloured squares; the colour is the label."""

    gives = frozenset({"crops", "index", "label"})
    seed, batch_size = 0, 16

    def __init__(self, n=96, noise=20, labelled=True):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.count, self.classes, self.labelled = n, ["r", "g", "b"], labelled
        self.y = torch.randint(3, (n,), generator=g)
        x = COLOURS[self.y][:, :, None, None] + noise * torch.randn(n, 3, 6, 6, generator=g)
        self.x = x.clamp(0, 255).to(torch.uint8)

    def train_dataloader(self):
        rows = shuffled(self.count, "order").split(self.batch_size)
        batches = [
            {"crops": [self.x[r]], "index": r, "step": i}
            | ({"label": self.y[r]} if self.labelled else {})
            for i, r in enumerate(rows)
        ]
        return DataLoader(batches, batch_size=None)

    def labels(self, split):
        assert split == "train"  # a probe never looks at the test set
        return self.y if self.labelled else None

    def selection(self):
        order = shuffled(self.count, "selection")  # not sorted
        return order[24:], order[:24]

    def scan(self, split, start=0, stop=None, batch_size=256):
        assert split == "train"
        stop = self.count if stop is None else stop
        torch.rand(1)  # as loaders do
        for first in range(start, stop, batch_size):
            yield {"crops": [self.x[first : min(first + batch_size, stop)]]}


class Backbone(nn.Sequential):
    dim = 8

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


class Predict(pl.LightningModule):
    """A method that trains on something else than labels, and uses torch's global generator."""

    def __init__(self, show=True):
        super().__init__()
        self.backbone, self.show, self.seen = Backbone(), show, {}
        self.drop = nn.Dropout(0.5)

    def training_step(self, batch, batch_idx):
        x = normalize(batch["crops"][0])
        h = self.backbone(x)
        self.seen = {"features": h.detach()} if self.show else {}
        return F.mse_loss(self.drop(h).mean(1), x.std((1, 2, 3)))

    def configure_optimizers(self):
        optim = Optim(torch.optim.SGD, lr=0.1)
        return optim(self, batch_size=16, steps=100, steps_per_epoch=6)


class Log(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def of(self, name):
        return [float(row[name]) for _, row in self.rows if name in row]


def fit(*callbacks, epochs=1, data=None, method=None, path=None, folder=None, **kwargs):
    torch.manual_seed(0)
    log, method = Log(), method or Predict()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=log,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **kwargs,
    )
    trainer.fit(method, data or Data(), ckpt_path=path)
    return method, log, trainer


def test_probes_do_not_change_the_training():
    plain, _, _ = fit(epochs=3)
    probed, log, trainer = fit(OnlineKNN(), OnlineLinear(), epochs=3)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, probed.state_dict()[key]), key
    assert set(plain.state_dict()) == set(probed.state_dict())
    assert len(trainer.optimizers) == 1
    assert len(log.of("online/knn_top1")) == 3
    assert len(log.of("online/linear_top1")) == 18
    assert all(module.training for module in probed.backbone.modules())


def test_knn_is_that_of_the_held_out_images():
    torch.manual_seed(0)
    data, backbone = Data(noise=400), Backbone()
    probe = OnlineKNN(k=5, limit=40)
    score = probe.score(backbone, data)
    assert backbone.training
    with torch.no_grad():
        z = F.normalize(backbone.eval()(normalize(data.x)), dim=1)
    bank, queries = (
        rows[subset(data.y[rows].tolist(), len(rows), 40, 0, "online_knn")]
        for rows in (part.sort().values for part in data.selection())
    )
    assert (len(bank), len(queries)) == (40, 24)
    assert not set(bank.tolist()) & set(queries.tolist())
    similarity, near = (z[queries] @ z[bank].T).topk(5)
    votes = torch.zeros(24, 3)
    votes.scatter_add_(1, data.y[bank][near], (similarity / 0.07).exp())
    assert score == pytest.approx((votes.argmax(1) == data.y[queries]).float().mean().item())
    assert 0.3 < score < 1
    assert OnlineKNN().score(Backbone(), Data(noise=1)) == 1


def test_knn_reads_many_images_in_their_order(monkeypatch):
    from unlabeled.callbacks import online

    torch.manual_seed(0)
    data, backbone, probe = Data(noise=400), Backbone(), OnlineKNN(k=3, limit=50)
    once = probe.score(backbone, data)
    monkeypatch.setattr(online, "BATCH", 4)
    assert probe.score(backbone, data) == once


def test_knn_every_n_epochs():
    _, log, _ = fit(OnlineKNN(every_n_epochs=2), epochs=5)
    assert [metrics["epoch"] for _, metrics in log.rows if "online/knn_top1" in metrics] == [1, 3]


def test_linear_learns_beside_the_method():
    _, log, _ = fit(OnlineLinear(lr=0.5), epochs=6)
    top1 = log.of("online/linear_top1")
    assert sum(top1[-6:]) / 6 > 0.95
    assert top1[0] < 0.7  # before it has learned anything


def test_linear_is_scored_before_its_update():
    probe = OnlineLinear(lr=100.0)
    probe.head = nn.Linear(2, 2)
    nn.init.zeros_(probe.head.weight)
    nn.init.zeros_(probe.head.bias)
    probe.optimizer = torch.optim.SGD(probe.head.parameters(), lr=100.0)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0])
    assert probe.learn(x, y) == 0.5  # equal logits: the lower class
    assert probe.learn(x, y) == 1


def test_linear_survives_a_checkpoint(tmp_path):
    _, log, _ = fit(OnlineLinear(), epochs=4)
    trainer = fit(OnlineLinear(), epochs=2)[-1]
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["OnlineLinear"]
    assert saved["optimizer"]["state"][0]["momentum_buffer"].abs().sum() > 0
    probe = OnlineLinear()
    _, resumed, _ = fit(probe, epochs=2, path=tmp_path / "half.ckpt")
    assert resumed.of("online/linear_top1") == []  # nothing left to train
    torch.testing.assert_close(probe.state_dict(), saved)
    _, resumed, _ = fit(OnlineLinear(), epochs=3, path=tmp_path / "half.ckpt")
    assert resumed.of("online/linear_top1")[0] == log.of("online/linear_top1")[12]


@pytest.mark.parametrize("probe", [OnlineKNN, OnlineLinear])
def test_missing_labels_are_named(probe):
    with pytest.raises(ValueError, match=f"{probe.__name__} needs labels to probe Predict"):
        fit(probe(), data=Data(labelled=False))


def test_no_queries_are_known_before_the_training():
    data = Data()
    data.selection = lambda: (torch.arange(96), torch.arange(0))
    with pytest.raises(ValueError, match="online_knn has no queries: of the 96 training images"):
        fit(OnlineKNN(), data=data)


def test_missing_features_are_named():
    with pytest.raises(ValueError, match="Predict shows no features"):
        fit(OnlineLinear(), method=Predict(show=False))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: OnlineKNN(k=0), "0"),
        (lambda: OnlineKNN(temperature=-1.0), "-1"),
        (lambda: OnlineLinear(lr=0.0), "lr"),
        (lambda: OnlineLinear(momentum=1.0), "momentum"),
    ],
)
def test_wrong_settings_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
