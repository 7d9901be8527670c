"""Weights, gradients and optimizer states in shards over the processes (trainer=fsdp).

Zhao et al., 2023, https://arxiv.org/abs/2304.11277, as torch's `fully_shard` does it. Lightning's
own `fsdp` strategy runs on GPUs only and flattens what it wraps; here parameters stay what they
are, so that LARS sees layers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from unlabeled import dist


class FullyShard(ModelParallelStrategy):
    """All processes share one copy of the weights, and each trains on its part of the batch.

    `Method.configure_model` does the sharding. Checkpoints are those of any other strategy: one
    file with whole weights and optimizer states, for any number of processes.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether `load_optimizer_state_dict` is called."""
        return True

    def setup_environment(self) -> None:
        """Makes all processes of all nodes one row."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors in the first process's memory, none in others; every process calls."""
        assert self.lightning_module is not None
        return _whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same of an optimizer, its parameters numbered as by the optimizer itself."""
        saved = getattr(optimizer, "_optimizer", optimizer).state_dict()
        states = {i: _whole(state) for i, state in saved["state"].items()}
        return {**saved, "state": states}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A checkpoint whose tensors stay on the disk until shards are cut from them."""
        return torch.load(checkpoint_path, "cpu", mmap=True, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Shards of the whole weights of a checkpoint."""
        assert self.lightning_module is not None
        here, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        state = {k: dist.shard_of(x, here[k]) if k in here else x for k, x in saved.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shards of whole optimizer states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            order = [i for group in saved["param_groups"] for i in group["params"]]
            shapes = dict(zip(order, params, strict=True))
            states = {
                i: {k: _shard_of(x, shapes[i]) for k, x in state.items()}
                for i, state in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": states})


def _whole(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, x in state.items():
        full = dist.whole(x).cpu() if isinstance(x, Tensor) else x
        if dist.rank() == 0:
            found[name] = full
    return found


def _shard_of(x: Any, p: Tensor) -> Any:
    """A state of a parameter; counters and the like are every process's own."""
    return dist.shard_of(x, p) if isinstance(x, Tensor) and x.shape == p.shape else x
