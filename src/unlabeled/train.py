"""Pretrain a backbone by a method, then evaluate it.

    unlabeled method=barlow_twins backbone=resnet50 data=imagenet evals=standard
    unlabeled method=none backbone=checkpoint backbone.path=RUN evals=standard

Everything heavy is imported where it is used, so that `--help` costs no more than Hydra.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # run as a script: this folder's names must not hide other packages

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from unlabeled import group, slurm
from unlabeled.cli import building, hydra_files, launch

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger
    from torch import nn

    from unlabeled.dashboards import Dashboards
    from unlabeled.evaluate.store import FeatureStore
    from unlabeled.folder import Folder

TAKES_LONG = """evaluation {name}: trains networks, which may take long. Stop it, and scores \
that {path}/scores.json has by now stay; the same command goes on; ~evals.{name} leaves it out"""


def run(cfg: DictConfig, out: Path) -> dict[str, float]:
    """One run: config in, scores out; what it makes lies in the folder `out`."""
    import copy

    import pytorch_lightning as pl
    from hydra.utils import instantiate

    from unlabeled.checkpoints import NEWEST
    from unlabeled.dashboards import Dashboards
    from unlabeled.evaluate.store import opened
    from unlabeled.evaluate.suite import refuse
    from unlabeled.folder import Folder, plain
    from unlabeled.memory import reuse_freed_memory
    from unlabeled.report import html, terminal
    from unlabeled.report.run import supervised_scores

    slurm.watch.listen()
    reuse_freed_memory()
    if cfg.compare:
        return _compare(cfg, out)
    with Folder(out, cfg, hydra_files()) as folder:
        with building():
            known = supervised_scores(cfg.baseline.supervised)
            if not 0 <= cfg.seed < 1 << 32:
                raise ValueError(f"seed must be in [0, 4294967295], got {cfg.seed}")
            pl.seed_everything(cfg.seed, workers=True, verbose=False)
            data = instantiate(cfg.data)
            data.setup("fit" if cfg.method else "test")
            evals = {name: instantiate(node) for name, node in cfg.evals.items()}
            todo = {name: e for name, e in evals.items() if not folder.has_scores(str(name))}
            boards = Dashboards(out, [instantiate(node) for node in cfg.logger.values()])
            trainer = _trainer(cfg, out, boards.loggers)
            store = opened(cfg.features, out / "features", cfg.feature_dtype)
            if cfg.method:
                method = instantiate(cfg.method)
                backbone = method.backbone
                method.run_identity = folder.identity
                method.backbone_config = getattr(backbone, "config", None) or plain(cfg.backbone)
                random = _random_twin(cfg, backbone) if _learned(cfg) else copy.deepcopy(backbone)
            else:
                method, backbone = None, instantiate(cfg.backbone)
                random = _random_twin(cfg, backbone)
            if _named(cfg):
                refuse(todo, data, backbone)  # now, not after hours of training
        done = folder.before.get("state") == "finished" and (method is None or folder.trained)
        with boards.showing(bool(todo) or not done):
            epochs = None if method is None else _fit(cfg, folder, trainer, method, data)
            boards.keep("checkpoint", [last := out / "checkpoints" / NEWEST])
            if method is not None and method.sharded:
                backbone = _random_twin(cfg, backbone)  # of whole weights, which evaluations read
                folder.load(backbone, last)
            scores = _evaluate(
                cfg, folder, boards, todo, (backbone, random), data, trainer, store, known, epochs
            )
            boards.publish()
    if trainer.is_global_zero:
        html.write(out)
        terminal.show(out)
    return scores


def _compare(cfg: DictConfig, out: Path) -> dict[str, float]:
    """One table and one report over runs that are there."""
    from unlabeled.report import compare, terminal

    with building():
        if cfg.method:
            raise ValueError("compare=[RUN,...] trains nothing: write method=none beside it")
        found = compare.write([Path(path) for path in cfg.compare], out)
    terminal.compare(found)
    return {}


def _fit(cfg: DictConfig, folder: "Folder", trainer: "pl.Trainer", method: Any, data: Any) -> int:
    """Trains, unless an earlier start did; gives the number of epochs."""
    checkpoint = folder.checkpoint(cfg.resume)
    if checkpoint is not None and folder.trained:
        return folder.load(method.backbone, checkpoint)
    try:
        trainer.fit(method, data, ckpt_path=checkpoint, weights_only=True)
    except Exception:
        if method.started:
            raise
        with building():  # what set-up and the first batch refuse is wrong input
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    folder.mark_trained(trainer.current_epoch, trainer.global_step)
    return trainer.current_epoch


def _trainer(cfg: DictConfig, out: Path, loggers: list["Logger"]) -> "pl.Trainer":
    from hydra.utils import instantiate

    from unlabeled.callbacks.ending import finishes
    from unlabeled.callbacks.requeue import requeues
    from unlabeled.precision import chosen

    callbacks = [instantiate(node) for node in cfg.callbacks.values()]
    trainer = instantiate(
        cfg.trainer,
        precision=chosen(cfg.trainer.precision, cfg.trainer.accelerator),
        callbacks=[*callbacks, *requeues(callbacks)],
        logger=loggers,
        plugins=slurm.environment(),
        default_root_dir=str(out),
        enable_checkpointing=True,
    )
    slurm.check(trainer.num_nodes, trainer.num_devices)
    return finishes(trainer)


def _random_twin(cfg: DictConfig, backbone: "nn.Module") -> "nn.Module":
    """The architecture of a backbone at random initialisation."""
    from unlabeled.backbones.load import fresh
    from unlabeled.folder import plain

    return fresh(getattr(backbone, "config", None) or plain(cfg.backbone), seed=cfg.seed)


def _learned(cfg: DictConfig) -> bool:
    """Whether the backbone starts from somebody's weights."""
    return any(cfg.backbone.get(name) for name in ("path", "weights", "pretrained"))


def _evaluate(
    cfg: DictConfig,
    folder: "Folder",
    boards: "Dashboards",
    todo: dict[Any, Any],
    trunks: tuple["nn.Module", "nn.Module"],  # the backbone, and its random twin
    data: Any,
    trainer: "pl.Trainer",
    store: "FeatureStore",
    known: dict[str, float] | None,  # a supervised run's scores
    epochs: int | None,
) -> dict[str, float]:
    import shutil

    from unlabeled.callbacks.stages import stages
    from unlabeled.evaluate import figures
    from unlabeled.evaluate.scores import forget
    from unlabeled.evaluate.suite import evaluate, in_turn, trains_long

    (backbone, random), used = trunks, list[Any]()  # used: data
    if todo:
        group.meet(trainer)
    first = trainer.is_global_zero  # which processes that Lightning starts know once they have met
    if todo and first:
        forget(folder.path, [*todo])
    for turn, some in enumerate(in_turn(todo, data)):
        if first and turn and all(map(trains_long, some.values())):
            print(TAKES_LONG.format(name=next(iter(some)), path=folder.path), flush=True)
        with building(), stages() as progress:
            scores = evaluate(
                some,
                backbone=backbone,
                data=data,
                out=folder.path,
                seed=cfg.seed,
                device=trainer.strategy.root_device,
                random_backbone=random if cfg.baselines else None,
                pixels=cfg.baselines,
                progress=progress,
                epoch=epochs,
                explicit=_named(cfg),
                store=store,
                supervised=known,
            )
        if first:
            scores.write(folder.path)
            folder.mark_evaluated(scores.finished)
            used += [e.data or data for name, e in some.items() if name not in scores.skipped]
            for name, reason in scores.skipped.items():
                print(f"skipped the evaluation {name}: {reason}")
    if todo and first:
        figures.write(folder.path / "figures", store, backbone, data, seed=cfg.seed)
        stay = cfg.keep_features or cfg.features is not None
        boards.keep("features", store.kept(backbone, used), stay=stay)
        if not stay:
            shutil.rmtree(store.folder, ignore_errors=True)
    return folder.scores()


def _named(cfg: DictConfig) -> bool:
    """Whether evaluations were chosen by name, so that one that cannot run is an error."""
    if not HydraConfig.initialized():
        return True
    hydra = HydraConfig.get()
    chosen = hydra.runtime.choices.get("evals")
    typed = any(line.lstrip("+").startswith("evals") for line in hydra.overrides.task)
    return typed if chosen == "standard" else chosen != "all"


def main() -> None:
    """The console script `unlabeled`."""
    launch(_task, after=_after)


def _after() -> None:
    """A sweep ends with what became of its members."""
    if launched := sys.modules.get("unlabeled.sweep.launch"):
        launched.finish()


def _task(cfg: DictConfig) -> float | None:
    try:
        scores = run(cfg, Path(HydraConfig.get().runtime.output_dir))
    except slurm.Stopped as stop:
        slurm.watch.leave(str(stop))
    objective = OmegaConf.select(cfg, "objective")
    return scores.get(objective) if objective else None  # what a sweeper maximises


if __name__ == "__main__":
    main()
