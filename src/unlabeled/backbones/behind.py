"""A backbone behind a fixed step, which evaluations and exports then see images through too."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Behind(nn.Module, ABC):
    """What is in front of the backbone is `seen`; features and stages are the backbone's own.

    Args:
        model: the backbone behind it.
        settings: of the step, by the names of its arguments.
    """

    def __init__(self, model: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.dim = int(model.dim)  # type: ignore[arg-type]
        inner: Any = getattr(model, "config", None)
        target = f"{type(self).__module__}.{type(self).__qualname__}"
        self.config: dict[str, Any] | None = inner and {
            "_target_": target,
            "model": inner,
            **(settings or {}),
        }

    @abstractmethod
    def seen(self, x: Tensor) -> Tensor:
        """What the model sees (B, 3, H, W) of normalised images."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.seen(x))

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The model's own maps of what it sees."""
        return self.model.stages(self.seen(x))  # type: ignore[operator]
