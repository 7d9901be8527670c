"""Batches are a function of seed and position: not of workers, processes or interruptions."""

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from unlabeled.data.decode import Center, Crops
from unlabeled.data.images import Images
from unlabeled.data.layouts import Folder
from unlabeled.data.sampler import Batches


def batches(position=0, **changes):
    given = {"count": 23, "batch_size": 4, "seed": 0, **changes}
    return Batches(**given, position=lambda: position)


def test_an_epoch_visits_images_once_in_full_batches():
    keys = list(batches())
    assert len(keys) == len(batches()) == 5  # 3 images are left out
    seen = [index for rows in keys for index, _, _ in rows]
    assert len(set(seen)) == 20
    assert set(seen) <= set(range(23))
    assert [rows[0][1:] for rows in keys] == [(0, step) for step in range(5)]
    assert all(rows[0][1:] == key[1:] for rows in keys for key in rows)


def test_epochs_and_seeds_differ_and_repeat():
    first, second = list(batches()), list(batches(position=5))
    assert [rows[0][1:] for rows in second] == [(1, step) for step in range(5, 10)]
    order = [[[key[0] for key in rows] for rows in keys] for keys in (first, second)]
    assert order[0] != order[1]
    assert list(batches()) == first
    assert list(batches(seed=1)) != first


@pytest.mark.parametrize("position", [1, 3, 7])
def test_a_resumed_iteration_goes_on_where_it_stopped(position):
    stream = [*batches(), *batches(position=5), *batches(position=10)]
    assert list(batches(position=position)) == stream[position : position + 5]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_tile_the_global_batch(world):
    parts = [list(batches(rank=rank, world=world)) for rank in range(world)]
    tiled = [[key for rows in step for key in rows] for step in zip(*parts, strict=True)]
    assert tiled == list(batches())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"world": 3}, "batch_size=4 .* 3 processes"),
        ({"count": 3}, "batch_size=4 is more than the 3 .* data.batch_size=3"),
        ({"count": 3, "world": 2}, "data.batch_size=2 or less"),
    ],
)
def test_wrong_sizes_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        batches(**changes)


def test_an_order_of_ones_own_is_asked_for_when_its_epoch_begins():
    asked = []

    def order(epoch):
        asked.append(epoch)
        return torch.arange(22) * 0 + epoch if epoch else None

    own = Batches(23, 4, 0, position=lambda: 3, order=order)
    seen = [[key[0] for key in rows] for rows in own]
    assert seen[:2] == [[key[0] for key in rows] for rows in batches(position=3)][:2]
    assert seen[2:] == [[1] * 4] * 3
    assert asked == [0, 1]
    parts = Batches(23, 4, 0, position=lambda: 8, order=order)
    epochs = []
    for _ in parts.parts():
        assert asked[2:] == [1, 2][: len(epochs) + 1]  # not before the part before is used up
        epochs.append([rows[0][1] for rows in parts])
    assert epochs == [[1, 1], [2, 2, 2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_read_only_when_the_one_before_is_used_up(tree, workers):
    """The order of an epoch may depend on what was learned in the epochs before."""
    data, used, begun = images(tree, workers=workers), [], []

    def begin(epoch):
        begun.append((epoch, len(used)))

    data._begin = begin
    data._position = lambda: 3  # five batches of an epoch: two are left
    for batch in data.train_dataloader():
        used.append(batch["step"])
    assert used == [3, 4, 5, 6, 7]
    assert begun == [(0, 0), (1, 2)]


class Watch(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        rows = batch["index"].tolist(), batch["step"], batch["label"].tolist()
        self.seen.append((*rows, [crop.clone() for crop in batch["crops"]]))
        return self.layer(batch["index"].float().mean().view(1, 1)).sum() * 0

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0  # makes the iterator, before resuming
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        (root / name).mkdir()
        for i in range(10):
            pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


def images(root, **changes):
    given = {"batch_size": 4, "workers": 0, "tier": "folder", "size": 20, **changes}
    return Images(
        root=str(root),
        layout=Folder(test_share=0),
        decode=Crops(size=12, count=2),
        eval_decode=Center(size=12),
        **given,
    )


def fit(root, tmp_path, *, stop=-1, ckpt=None, max_epochs=2, limit=1.0, **changes):
    model, data = Watch(), images(root, **changes)
    every_step = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        max_steps=stop,
        limit_train_batches=limit,
        logger=False,
        callbacks=[every_step],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    return model.seen


def same(a, b):
    assert [x[:3] for x in a] == [x[:3] for x in b]
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(c, d) for c, d in zip(x[3], y[3], strict=True))
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tier", "workers", "stop"),
    [("memory", 0, 3), ("memory", 0, 5), ("memory", 0, 7), ("folder", 0, 3), ("folder", 2, 3)],
)
def test_a_stopped_run_goes_on_with_the_same_batches(tree, tmp_path, tier, workers, stop):
    whole = fit(tree, tmp_path / "whole", tier=tier, workers=0)
    assert [x[1] for x in whole] == list(range(10))
    first = fit(tree, tmp_path, tier=tier, workers=workers, stop=stop)
    rest = fit(tree, tmp_path, tier=tier, workers=workers, ckpt=tmp_path / "last.ckpt")
    assert len(first) == stop
    assert same([*first, *rest], whole)


@pytest.mark.filterwarnings("ignore")
def test_shortened_epochs_do_not_repeat_images(tree, tmp_path):
    """`limit_train_batches` ends Lightning's epochs early; the data goes on regardless."""
    steps = [x[1] for x in fit(tree, tmp_path, limit=3, max_epochs=3)]
    assert steps == list(range(9))


def test_workers_change_no_pixel_and_draw_no_random_numbers(tree):
    def read(workers):
        torch.manual_seed(0)
        loader = images(tree, workers=workers).train_dataloader()
        seen = [
            (b["index"].tolist(), b["step"], b["label"].tolist(), b["crops"])
            for _ in range(2)
            for b in loader
        ]
        return seen, torch.rand(3).tolist()

    alone, after = read(0)
    assert len(alone) == 10
    assert [x[1] for x in alone] == list(range(10))
    many, after_many = read(2)
    assert same(alone, many)
    torch.manual_seed(0)
    assert after == after_many == torch.rand(3).tolist()
    crops = torch.cat([x[3][0] for x in alone])
    assert len({crop.numpy().tobytes() for crop in crops}) == len(crops)  # epochs differ
