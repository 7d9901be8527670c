"""A stream: one pass over images without labels, stopped and gone on with, each met once."""

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from unlabeled.callbacks.checkpoint import Checkpoint
from unlabeled.data.decode import Center, Crops
from unlabeled.data.layouts import Folder, List
from unlabeled.data.sampler import Batches
from unlabeled.data.stream import Stream
from unlabeled.optim import Optim

COUNT, BATCH = 23, 4
PLACES = ["", "a", "a/b", "a/b/c/d/e", "x y", "ü/z"]  # no two as deep, some beside folders


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    for i in range(COUNT):
        folder = root / PLACES[i % len(PLACES)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    (root / "list.txt").write_bytes("\r\n".join([*names[::2], "", *names[1::2]]).encode())
    return root


def stream(root, *, layout=None, **changes):
    given = {"batch_size": BATCH, "workers": 0, "tier": "folder", **changes}
    return Stream(
        root=str(root),
        layout=layout or Folder(test_share=0, labels=False),
        decode=Crops(size=8, count=2),
        eval_decode=Center(size=8),
        **given,
    )


class Watch(pl.LightningModule):
    """Keeps indices, learning rates and how long training is."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.rates = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.layer(batch["index"].float().mean().view(1, 1)).sum() * 0

    def configure_optimizers(self):
        self.steps = self.trainer.estimated_stepping_batches
        optim = Optim(torch.optim.SGD, lr=1.0, scaling="none", warmup=0.8, warmup_start=0.1)
        return optim(self, batch_size=BATCH, steps=int(self.steps), steps_per_epoch=1)


def fit(data, folder, *, stop=None, ckpt=None, **trainer):
    model = Watch()
    if stop is not None:

        def killed(out, batch, i):
            if model.trainer.global_step == stop:
                raise KeyboardInterrupt

        model.on_train_batch_start = lambda batch, i: killed(None, batch, i)
    every_step = Checkpoint(
        folder=str(folder), every_n_steps=1, every_n_minutes=None, every_n_epochs=None
    )
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False} | trainer
    made = pl.Trainer(
        **settings,
        callbacks=[every_step],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        made.fit(model, data, ckpt_path=ckpt, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert stop is not None
    return model


def flat(seen):
    return [i for batch in seen for i in batch]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", ["folder", "list"])
def test_a_stream_that_stops_twice_meets_each_image_once(tree, tmp_path, layout, workers):
    def data():
        made = List(train="list.txt") if layout == "list" else None
        return stream(tree, layout=made, workers=workers)

    whole = fit(data(), tmp_path / "whole")
    assert whole.steps == len(whole.seen) == COUNT // BATCH == 5
    assert len(set(flat(whole.seen))) == 20  # the incomplete last batch is left out
    parts, ckpt = [], None
    for stop in (1, 3, None):
        part = fit(data(), tmp_path, stop=stop, ckpt=ckpt)
        parts.append(part)
        ckpt = tmp_path / "last.ckpt"
    assert [len(p.seen) for p in parts] == [1, 2, 2]
    assert [b for p in parts for b in p.seen] == whole.seen
    # the warm-up counts updates of all parts
    assert [r for p in parts for r in p.rates] == pytest.approx(whole.rates)
    assert whole.rates[:4] == pytest.approx([0.1, 0.325, 0.55, 0.775])
    after = fit(data(), tmp_path, ckpt=ckpt)  # it is over
    assert not after.seen


@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_ranks_meet_each_image_once_also_where_their_number_changes(first, then, stop):
    def run(world, start, end):
        ranks = [
            list(Batches(COUNT, BATCH, 0, position=lambda: start, rank=r, world=world))
            for r in range(world)
        ]
        assert {len(keys) for keys in ranks} == {COUNT // BATCH}
        return [key for step in range(end - start) for keys in ranks for key in keys[step]]

    met = [*run(first, 0, stop), *run(then, stop, COUNT // BATCH)]
    whole = run(1, 0, COUNT // BATCH)
    assert met == whole
    assert len({index for index, _, _ in met}) == len(met) == 20
    assert {epoch for _, epoch, _ in met} == {0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 9}])
def test_more_than_one_pass_is_refused(tree, tmp_path, trainer):
    with pytest.raises(ValueError, match=r"one pass of 5 batches.*trainer\.max_epochs=1"):
        fit(stream(tree), tmp_path, **trainer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "named"),
    [({"batch_size": 2}, "batch_size"), ({"seed": 1}, "seed"), ({"limit": 20}, "images")],
)
def test_going_on_in_another_order_is_refused(tree, tmp_path, change, named):
    fit(stream(tree), tmp_path, stop=2)
    with pytest.raises(ValueError, match=f"other {named}: images would come twice"):
        fit(stream(tree, **change), tmp_path, ckpt=tmp_path / "last.ckpt")


def test_folders_are_no_classes(tree):
    layout = Folder(test_share=0, labels=False)
    split = layout(tree, 0)["train"]
    assert (len(split), split.labels, split.classes) == (COUNT, None, ())
    both = Folder(test_share=0)(tree / "a", 0)["train"]
    assert both.labels is None  # images lie beside folders
    data = stream(tree)
    data.setup("fit")
    assert "label" not in data.gives
    assert not data.has("test")
    assert data.count == COUNT


def test_folders_that_look_like_classes_are_none_either(tmp_path):
    for name in ("000", "001"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    assert Folder(test_share=0)(tmp_path, 0)["train"].classes == ("000", "001")
    assert Folder(test_share=0, labels=False)(tmp_path, 0)["train"].labels is None


def test_a_list_keeps_its_order_and_reads_nothing_else(tree):
    split = List(train="list.txt")(tree, 0)["train"]
    names = [line for line in (tree / "list.txt").read_text().splitlines() if line]
    assert [split.name(i) for i in range(len(split))] == names
    assert len(names) == COUNT
    assert names != sorted(names)
    assert {int(split.image(i)[0, 0, 0]) for i in range(COUNT)} == set(range(COUNT))
    splits = List(train=str(tree / "list.txt"), test="list.txt")(tree, 0)
    assert splits.keys() == {"train", "test"}
    other = List(train="list.txt")(tree, 5)["train"]
    assert other.identity() == split.identity()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read the list of images .*wrong.txt"),
        ("\n \n", "names no image"),
        ("nowhere.png\n", "not there: .*nowhere.png"),
        ("a/1.png\na/7.png\na/1.png\n", "names 1 of its 3 images again"),
    ],
)
def test_wrong_lists_say_what_is_wrong(tree, text, said):
    file = tree / "wrong.txt"
    file.unlink(missing_ok=True)
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=said):
        List(train="wrong.txt")(tree, 0)
