"""The number format that a machine computes fastest in."""

OTHER = (
    "64",
    "64-true",
    "bf16-true",
    "16-true",
    "transformer-engine",
    "transformer-engine-float16",
)


def chosen(asked: str, accelerator: str) -> str:
    """bf16-mixed where the device computes bfloat16 faster than float32, else 32-true.

    Args:
        asked: Lightning's `precision`, or "auto".
        accelerator: Lightning's.

    Raises:
        ValueError: parameters would be kept in another format than float32.
    """
    import torch

    if str(asked) in OTHER:
        raise ValueError(
            f"trainer.precision={asked} keeps parameters in another format than float32, which "
            "views and memories are made in: choose bf16-mixed, 16-mixed, 32-true or auto"
        )
    if asked != "auto":
        return asked
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    # AVX-512 without its bfloat16 instructions only emulates them, slower than float32
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if fast else "32-true"
