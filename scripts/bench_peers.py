"""What other frameworks do with the same photographs: their documented SimCLR recipes at 224.

lightly (`pip install lightly`), called as its documentation does: `SimCLRTransform()` with its
defaults (crops of 0.08 to 1, jitter 0.8 0.8 0.8 0.2 with p = 0.8, grey 0.2, Pillow's blur 0.5 with
sigma 0.1 to 2, flip 0.5) on Pillow images, `SimCLRProjectionHead(512, 512, 128)`, `NTXentLoss()`,
torchvision's ResNet-18, SGD of lr 0.06: https://docs.lightly.ai/self-supervised-learning/examples/simclr.html

solo-learn, rebuilt, as its release on PyPI no longer installs: `symmetric.yaml` and `simclr.yaml`
of `scripts/pretrain/imagenet-100` (https://github.com/vturrisi/solo-learn) have the same numbers,
torchvision's transforms on Pillow images in the order crop (bicubic), jitter, grey, blur
(Pillow's), flip, a projector 512 - 4096 - 512, temperature 0.2. Its LARS is SGD here, which costs
less.

Both read files with `ImageFolder`, train in float32 NCHW on a CPU (their half precision is for
GPUs), and read with as many workers as this package in the same row.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

from unlabeled.batch import MEAN, STD

SIDE = 224
Pair = Callable[[Image.Image], Sequence[Tensor]]


def lightly_views() -> Pair:
    """Lightly's two views of an image. Raises ImportError without the package."""
    from lightly.transforms.simclr_transform import SimCLRTransform

    return SimCLRTransform(input_size=SIDE)


def solo_views() -> Pair:
    """solo-learn's two views of an image."""

    def blurred(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    bicubic = transforms.InterpolationMode.BICUBIC
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=(0.08, 1.0), interpolation=bicubic),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.Lambda(blurred)], p=0.5),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda image: [chain(image), chain(image)]


class Peer:
    """A peer's training loop, from files to updates.

    Args:
        views: two views of an image.
        head: on a ResNet-18's 512 features.
        loss: of both views' embeddings.
        folder: of images in folders of classes.
        batch_size: images.
        bf16: give it bfloat16 autocast and channels_last too.
    """

    def __init__(
        self,
        views: Pair,
        head: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        folder: Path,
        batch_size: int,
        *,
        bf16: bool = False,
    ) -> None:
        backbone = resnet18()
        backbone.fc = nn.Identity()
        self.net, self.loss, self.bf16 = nn.Sequential(backbone, head).train(), loss, bf16
        if bf16:
            self.net.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.06, momentum=0.9)
        data = ImageFolder(str(folder), transform=views)
        self.loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
        self.batches = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def step(self) -> None:
        """From files to an update."""
        pair, _ = next(self.batches)
        if self.bf16:
            pair = [x.contiguous(memory_format=torch.channels_last) for x in pair]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            first, second = (self.net(x) for x in pair)
        loss = self.loss(first.float(), second.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def lightly_loop(folder: Path, batch_size: int, *, bf16: bool = False) -> Peer:
    """Lightly's example. Raises ImportError without the package."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    head = SimCLRProjectionHead(512, 512, 128)
    return Peer(lightly_views(), head, NTXentLoss(), folder, batch_size, bf16=bf16)


def solo_loop(folder: Path, batch_size: int, *, bf16: bool = False) -> Peer:
    """solo-learn's recipe."""
    head = nn.Sequential(nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 512))
    return Peer(solo_views(), head, solo_loss, folder, batch_size, bf16=bf16)


def solo_loss(first: Tensor, second: Tensor, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of similarities (2N, 2N), each row without itself."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, (torch.arange(len(z)) + len(first)) % len(z))
