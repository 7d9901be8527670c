"""What every launcher does around its members: plans them, leaves the rest to `run`, tells."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from unlabeled.annotations import nearest
from unlabeled.errors import InputError
from unlabeled.redact import hidden
from unlabeled.report import sweep as table
from unlabeled.sweep import members
from unlabeled.sweep.members import Member
from unlabeled.sweep.settings import Settings, read

NUMBERED = "${hydra:job.num}"
UNSEEN = """warning: objective={objective} is of the data's test images, and Optuna chooses \
settings by it: it is no test score then. With data=cifar10_held_out, or a layout inside \
unlabeled.data.layouts.HeldOut, training images stand for them"""

_failed: dict[Path, list[Member]] = {}  # sweep -> members that this process saw fail


class Failed(RuntimeError):
    """Members of a sweep failed; the others ran all the same."""


def launch(
    config: DictConfig,
    jobs: Sequence[Sequence[str]],
    run: Callable[[Path, list[Member], Settings], None],
) -> list[JobReturn]:
    """Runs what is not finished of a sweep, and gives each job's objective back.

    Args:
        config: the sweep's, with Hydra's part.
        jobs: each one's overrides.
        run: runs members to their ends.

    Raises:
        InputError: the settings, or the objective, cannot be; another sweep uses the folder.
    """
    setup_globals()
    settings = read(OmegaConf.to_container(config.launcher, resolve=True))  # type: ignore[arg-type]
    optuna = "optuna" in str(config.hydra.sweeper.get("_target_"))
    objective = OmegaConf.select(config, "objective")
    _check(config, objective, needed=optuna)
    sweep = Path(str(config.hydra.sweep.dir)).absolute()
    if optuna and sweep not in _failed and not _held_out(config, str(objective)):  # once
        say(UNSEEN.format(objective=objective))
    raw = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    numbered = raw["subdir"] == NUMBERED  # type: ignore[index,call-overload]
    with open_dict(config):
        config.hydra.sweep.dir = str(sweep)  # `${now:}` means now, not when a member starts
    sweep.mkdir(parents=True, exist_ok=True)
    members.lock(sweep)
    jobs = [[_spelt(line) for line in job] for job in jobs]
    planned = members.plan(sweep, jobs, objective=objective, numbered=numbered)
    todo = list({m.number: m for m in planned if m.state != "finished"}.values())
    done = len({m.number for m in planned}) - len(todo)
    table.write(sweep)
    _hide(sweep / "multirun.yaml")
    kept = f", {done} finished before" if done else ""
    say(f"sweep of {len(todo)} runs{kept}: {sweep / 'sweep.html'}")
    try:
        if todo:
            run(sweep, todo, settings)
    finally:
        table.write(sweep)
    last = {m.number: m for m in members.records(sweep)}
    failed = {m.number: last[m.number] for m in todo if last[m.number].state != "finished"}
    _failed.setdefault(sweep, []).extend(failed.values())
    return [_returned(sweep, last[m.number], objective, strict=optuna) for m in planned]


def finish() -> None:
    """Says how the sweeps of this process ended.

    Raises:
        InputError: members failed, all by wrong input.
        Failed: members failed.
    """
    ended, failures = dict(_failed), [m for found in _failed.values() for m in found]
    _failed.clear()
    for sweep in ended:
        members.release(sweep)
    if not failures:
        return
    sweep = next(iter(ended))
    lines = [f"#{m.number} {m.state}: {m.reason or 'no reason known'}" for m in failures[:10]]
    if len(failures) > len(lines):
        lines.append(f"and {len(failures) - len(lines)} more")
    many = "a member" if len(failures) == 1 else f"{len(failures)} members"
    text = "\n  ".join([f"{many} of the sweep did not finish:", *lines])
    text += f"\n(the same command with hydra.sweep.dir={sweep} runs these again, and only these)"
    raise InputError(text) if all(m.code == 2 for m in failures) else Failed(text)


def told(sweep: Path, member: Member, left: int) -> None:
    """A line about a member that ended."""
    score = members.scores(sweep, member).get(member.objective or "")
    value = "" if score is None else f"  {member.objective} {score:.4g}"
    reason = f" ({member.reason})" if member.reason else ""
    keys = table.differing([m.overrides for m in members.records(sweep)])
    swept = [o for o in member.overrides if o.partition("=")[0].lstrip("+") in keys]
    say(
        f"#{member.number} {member.state} after {table.clock(member.seconds)}{value}{reason}: "
        f"{' '.join(swept)}  ({left} to go)"
    )


def say(text: str) -> None:
    """A line of the sweep's, beside those of its members."""
    print(f"unlabeled: {hidden(text)}", file=sys.stdout, flush=True)


def _hide(path: Path) -> None:
    """Takes secrets out of a file that Hydra wrote."""
    if path.exists() and (text := path.read_text(encoding="utf-8")) != hidden(text):
        path.write_text(hidden(text), encoding="utf-8")


def _check(config: DictConfig, objective: str | None, *, needed: bool) -> None:
    if objective is None:
        if needed:
            raise InputError(
                "hydra/sweeper=optuna needs a score to maximise: objective=knn/k20_t0.07/top1"
            )
        return
    evals = OmegaConf.select(config, "evals")
    swept = any("evals" in str(line) for line in config.hydra.overrides.task)
    first = objective.split("/")[0]
    if evals is not None and not swept and first not in {*map(str, evals), "baseline"}:
        names = [str(name) for name in evals]
        near = nearest(first, names)
        hint = f"did you mean {near}/...?" if near else f"this sweep runs evals={names}"
        raise InputError(f"objective={objective}: no evaluation is called {first!r}; {hint}")


def _held_out(config: DictConfig, objective: str) -> bool:
    """Whether the data behind a score have training images stand for their test images."""
    own = OmegaConf.select(config, f"evals.{objective.split('/')[0]}.data")
    node = OmegaConf.select(config, "data") if own is None else own
    layout = OmegaConf.select(node, "layout._target_") if OmegaConf.is_config(node) else None
    return str(layout).endswith("HeldOut")


def _spelt(line: str) -> str:
    """An override as YAML means it: a sweeper may have written Python's None."""
    key, _, value = line.partition("=")
    return f"{key}=null" if value == "None" else line


def _returned(sweep: Path, member: Member, objective: str | None, *, strict: bool) -> JobReturn:
    """A member's result for the sweeper: a failed one only stops a sweeper that learns from it."""
    result = JobReturn(overrides=member.overrides, task_name="unlabeled")
    result.status = JobStatus.COMPLETED
    result.return_value = None
    if objective is not None and member.state == "finished":
        scores: dict[str, Any] = members.scores(sweep, member)
        result.return_value = scores.get(objective)
    if strict and result._return_value is None:
        result.status = JobStatus.FAILED
        result.return_value = Failed(f"#{member.number}: {member.reason or f'no {objective}'}")
    return result
