"""A method that goes on from what another run of it ended with."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


def continue_from(saved: Mapping[str, Tensor], module: nn.Module, new: Sequence[str] = ()) -> None:
    """Puts parameters and buffers of another run into a module, all of them.

    Args:
        saved: by name.
        module: what goes on.
        new: beginnings of names that are not taken over, and may be missing.

    Raises:
        ValueError: something is missing, has another shape or was made with other data.
    """
    new = tuple(new)
    state = {name: x for name, x in saved.items() if not name.startswith(new)}
    try:
        told = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(f"method.source was made with other sizes: {first[0].strip()}") from error
    missing = [name for name in told.missing_keys if not name.startswith(new)]
    if wrong := [*missing, *told.unexpected_keys]:
        raise ValueError(
            f"method.source is a run of something else: {len(missing)} of its parts are missing, "
            f"{len(told.unexpected_keys)} unknown ({', '.join(wrong[:3])}, ...): name a run of "
            "this method with the same backbone, variant and data"
        )
