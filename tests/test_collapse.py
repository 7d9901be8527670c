"""Without its stop of gradients or its predictor SimSiam collapses, on real images (marker `slow`).

Each of fifteen trainings takes 400 updates on 2 000 images of CIFAR-10, with the settings of
conf/experiment/cifar10 except for width, batch and learning rate. Three minutes on one core.
"""

import logging
import os
from pathlib import Path

import pytest
import torch

from unlabeled.callbacks.health import health
from unlabeled.draws import Draws

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HOME = Path(os.environ.get("UNLABELED_DATA") or Path.home() / ".cache/unlabeled-data")
SEEDS = (0, 1, 2)
ARMS = {
    "both": [],
    "no stop": ["method.stop_gradient=false"],
    "no predictor": ["method.predictor=none"],
    "no stop, no norm": ["method.stop_gradient=false", "method.last_norm=none"],
    "no predictor, no norm": ["method.predictor=none", "method.last_norm=none"],
}
SMALL = [
    *("data.limit=2000", "data.batch_size=64", "data.layout.download=false"),
    *("backbone.width=8", "method.dim=64", "method.bottleneck=16", "method.optim.lr=0.2"),
    *("trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=-1", "trainer.max_steps=400"),
    *("callbacks=none", "evals=none"),
]


@pytest.fixture(scope="module")
def trained(compose):
    """A function: arm, seed -> health of embeddings after 400 updates; each is trained once."""
    import pytorch_lightning as pl
    from hydra.utils import instantiate

    root = HOME / "cifar10"
    if not (root / "train").is_dir() and not (root / "cifar-10-batches-py").is_dir():
        pytest.skip(f"needs CIFAR-10 in {root}: set UNLABELED_DATA")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    found = {}

    def made(arm, seed):
        if (arm, seed) in found:
            return found[arm, seed]
        settings = ["experiment=cifar10/simsiam", f"data.root={root}", f"seed={seed}"]
        cfg = compose(*settings, *SMALL, *ARMS[arm])
        pl.seed_everything(seed, workers=True, verbose=False)
        method, data = instantiate(cfg.method), instantiate(cfg.data)
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        instantiate(cfg.trainer, **dict.fromkeys(off, False)).fit(method, data)
        found[arm, seed] = measured(method.train(), data)
        numbers = ", ".join(f"{k} {v:.3f}" for k, v in found[arm, seed].items())
        print(f"{arm}, seed {seed}: {numbers}")
        return found[arm, seed]

    return made


@torch.no_grad()
def measured(method, data):
    """Health of the embeddings of 512 augmented images, with batch norm as in training."""
    data.batch_size = 512
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    method.loss(method.augment(batch, Draws(data.seed, "measured", rows=512)))
    return health(method.seen["embeddings"])


@pytest.mark.parametrize("seed", SEEDS)
def test_with_both_embeddings_fill_their_space(trained, seed):
    assert trained("both", seed)["std"] > 0.9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("arm", ["no stop", "no predictor"])
def test_without_either_they_collapse(trained, arm, seed):
    whole, left = trained("both", seed), trained(arm, seed)
    assert left["std"] < 0.6
    assert left["effective_rank"] < whole["effective_rank"] / 2
    assert left["mean_cosine"] > whole["mean_cosine"] + 0.4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("arm", ["no stop", "no predictor"])
def test_a_last_norm_without_scale_and_shift_keeps_them_from_one_point(trained, arm, seed):
    fixed, free = trained(arm, seed), trained(f"{arm}, no norm", seed)
    assert free["std"] < 0.1
    assert fixed["std"] > 2 * free["std"]
