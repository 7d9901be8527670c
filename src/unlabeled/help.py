"""What `unlabeled --help` says: read from the config tree's names, without composing it."""

import re
import textwrap
from pathlib import Path

import yaml

USAGE = """\
unlabeled: learn visual representations without labels, and measure how good they are.

usage: unlabeled [group=choice ...] [key=value ...] [options]

  unlabeled                                           the demo
  unlabeled method=byol backbone=resnet50 data=folder data.root=DIR evals=standard
  unlabeled method=none backbone=checkpoint backbone.path=RUN evals=[knn,linear]
  unlabeled method=byol --cfg job                     show the config and all its keys
  unlabeled -m method=simclr,byol seed=0,1,2          a run for each combination
"""
OPTIONS = """\
options
  -m, --multirun     several values of a key are several runs
  --cfg job          show the composed config and stop (--resolve: with references resolved)
  --info [WHAT]      how the config is composed: defaults, searchpath, plugins, ...
  --config-dir DIR   a folder with further choices, in sub-folders named like the groups
  --hydra-help       Hydra's own options
  debug=true         full tracebacks
"""


def text(conf: Path, name: str) -> str:
    """The help of a config tree with this root."""
    root = yaml.safe_load((conf / f"{name}.yaml").read_text()) or {}
    defaults = [d for d in root.get("defaults", []) if isinstance(d, dict)]
    names = (str(group).removeprefix("override ") for item in defaults for group in item)
    groups = {name: name for name in names}
    for path in sorted((conf / "method").glob("*.yaml")):  # what a method chooses from
        for group, place in re.findall(r"- /(\w+)@(\w+):", path.read_text()):
            groups[f"{group}@method.{place}"] = group
    lines = [_choices(conf, place, group) for place, group in groups.items()]
    return "\n".join([USAGE, "choices", *filter(None, lines), "", OPTIONS])


def _choices(conf: Path, place: str, group: str) -> str:
    folder = conf / group
    names = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    indent = " " * 26
    filled = textwrap.fill(", ".join(names), 100, initial_indent=indent, subsequent_indent=indent)
    return f"  {place:<24}{filled[26:]}" if names else ""
