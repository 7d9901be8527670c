"""A backbone with a linear classifier on top, itself a backbone whose features are logits."""

from typing import Any

from torch import Tensor, nn


class Classifier(nn.Module):
    """Logits W f(x) + b as features, for methods that learn from a classifier's answers.

    Args:
        model: f.
        classes: number of logits.
    """

    logits = True

    def __init__(self, *, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model, self.dim = model, classes
        self.head = nn.Linear(int(model.dim), classes)  # type: ignore[arg-type]
        inner: Any = getattr(model, "config", None)
        target = "unlabeled.backbones.classifier.Classifier"
        self.config: dict[str, Any] | None = inner and {
            **{"_target_": target, "model": inner},
            "classes": classes,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x))

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The maps of the backbone."""
        return self.model.stages(x)  # type: ignore[operator]
