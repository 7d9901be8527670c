"""Images in one pass: a stream without epochs."""

from typing import Any

from unlabeled.data.images import Images


class Stream(Images):
    """Images that a run meets once each, in an order fixed by the seed (Goyal et al., 2021).

    The number of updates follows from the number of images: count // batch_size, and the images
    that would make a last incomplete batch are left out. A run that stops goes on behind the
    last batch it has trained on, with any number of processes; with other images, another batch
    size or another seed it would meet images twice and others never, so it refuses. (A readable
    image that stands in for an unreadable one is met again in its own turn.)

    The arguments are those of `Images`.
    """

    def setup(self, stage: str | None = None) -> None:
        """Reads the root once.

        Raises:
            ValueError: as `Images`, the trainer is to make more than one pass, or what is trained
                keeps something of each image until it meets it again.
        """
        super().setup(stage)
        method = None if self.trainer is None else self.trainer.lightning_module
        for part in () if method is None else method.modules():
            if stage == "fit" and getattr(part, "revisits", False):
                raise ValueError(
                    f"{type(part).__name__} keeps something of each image (an embedding, a "
                    "cluster) until it meets it again, and a stream meets each image once: take "
                    "the images by data=folder, data=shards or data=yfcc1m, or another method"
                )
        if stage == "fit" and self.trainer is not None and self.trainer.max_epochs != 1:
            raise ValueError(
                f"a stream is one pass of {self.count // self.batch_size} batches, got "
                f"trainer.max_epochs={self.trainer.max_epochs}: set trainer.max_epochs=1 "
                "(trainer.max_steps may end it sooner)"
            )

    def state_dict(self) -> dict[str, Any]:
        """What fixes the order of images; the position is the trainer's."""
        images = self._read().split("train").identity()
        return {"images": images, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares a checkpoint's order with this one's. Raises ValueError if they differ."""
        here = self.state_dict()
        if other := [name for name, value in state_dict.items() if here.get(name) != value]:
            raise ValueError(
                f"the stream cannot go on in the middle with other {' and '.join(other)}: images "
                "would come twice. Bring them back, or start anew with resume=none"
            )
