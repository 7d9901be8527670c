"""Batch norm of each task's own in a network that tasks share."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class TaskNorms(nn.Module):
    """Statistics, scales and shifts for every task but the first, whose are the network's own.

    So the network is saved and evaluated as any other, with the norms of the first task.

    Args:
        network: shared by the tasks; not a part of this module.
        tasks: their names; fewer than two share the network's norms.
        norm: "per_task", or "shared": all share them.

    Raises:
        ValueError: another norm; or the network has no batch norm, or computes blocks again in
            the backward pass, when another task's norms may be in place.
    """

    def __init__(self, network: nn.Module, tasks: Sequence[str], norm: str = "per_task") -> None:
        super().__init__()
        if norm not in ("shared", "per_task"):
            raise ValueError(f"norm must be shared or per_task, got {norm!r}")
        self.places: list[tuple[nn.Module, str]] = []
        self.others = nn.ModuleDict()
        if len(tasks) < 2 or norm == "shared":
            return
        found = [name for name, m in network.named_modules() if isinstance(m, _BatchNorm)]
        if not found or getattr(network, "recomputed", None):
            reason = "recomputes activations" if found else "has no batch norm"
            raise ValueError(f"norm=per_task: {type(network).__name__} {reason}; set norm=shared")
        cuts = [name.rpartition(".") for name in found]
        self.places = [(network.get_submodule(parent), leaf) for parent, _, leaf in cuts]
        for task in tasks[1:]:
            self.others[task] = nn.ModuleList(copy.deepcopy(self.own()))

    def own(self) -> list[nn.Module]:
        """The network's norms as they are now."""
        return [getattr(parent, leaf) for parent, leaf in self.places]

    def all_parameters(self) -> list[nn.Parameter]:
        """Those of all tasks, the network's too."""
        return [p for m in (*self.own(), *self.others.values()) for p in m.parameters()]

    @contextmanager
    def of(self, task: str) -> Iterator[None]:
        """The network has this task's norms meanwhile."""
        own = self.own()
        try:
            if task in self.others:
                self._put(self.others[task])  # type: ignore[arg-type]
            yield
        finally:
            self._put(own)

    def _put(self, norms: Sequence[nn.Module]) -> None:
        for (parent, leaf), norm in zip(self.places, norms, strict=True):
            parent._modules[leaf] = norm
