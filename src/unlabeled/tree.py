"""The config tree as Hydra sees it, within an initialised Hydra."""

from collections.abc import Sequence
from typing import Any

from hydra import compose
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig


def composed(name: str, job: Sequence[Override]) -> DictConfig:
    """The config of one job, with Hydra's own part."""
    return compose(name, overrides=[str(o.input_line) for o in job], return_hydra_config=True)


def parsed(line: str) -> Override:
    """An override that is known to be well-formed."""
    return OverridesParser.create().parse_overrides([line])[0]


def options(loader: Any, group: str) -> list[str]:
    """The choices of a group, `folder/choice` for those in folders; empty if it is no group."""
    if not group:
        return []
    of = loader.repository.get_group_options  # the loader's own method copies the tree each time
    inner = [
        f"{n}/{o}" for n in of(group, ObjectType.GROUP) for o in options(loader, f"{group}/{n}")
    ]
    return [*of(group, ObjectType.CONFIG), *inner]
