"""A trained network that a method learns from and does not change."""

import hashlib

import torch
from torch import nn


class Frozen:
    """A network without gradients, in evaluation mode, that is no part of the method's state.

    (Nor is this a module: a method that holds one neither trains nor saves it.)

    Args:
        network: any trained network; `path`, if it has one, says where it is from.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False).eval()

    def on(self, device: torch.device) -> nn.Module:
        """The network, on a device."""
        return self.network.to(device)

    def record(self) -> dict[str, str | None]:
        """What a checkpoint keeps of it: where it came from, and a checksum of its weights."""
        digest = hashlib.blake2b(digest_size=16)
        for name, x in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        path = getattr(self.network, "path", None)
        return {"path": path, "checksum": digest.hexdigest()}
