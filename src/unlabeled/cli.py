"""The command line: Hydra's, with all mistakes at once, exit codes and no tracebacks."""

import functools
import os
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unlabeled.config import summary
from unlabeled.errors import InputError, raised_errors, tracebacks_wanted
from unlabeled.redact import hidden

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
REFUSALS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, ImportError)

Task = Callable[[DictConfig], float | None]


def conf_dir() -> Path:
    """The config tree: inside an installed package, else beside `src` in the repository."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parents[1] / "conf"


@contextmanager
def building() -> Iterator[None]:
    """What a constructor refuses in here is wrong input, named by the config node it is from.

    Raises:
        InputError: instead of a ValueError, a missing file or optional package, or Lightning's
            MisconfigurationException, also where Hydra wraps them.
    """
    try:
        yield
    except Exception as error:
        cause: Any = error.__cause__ if isinstance(error, InstantiationException) else error
        # by name: to import Lightning and ask takes seconds
        misconfigured = type(cause).__name__ == "MisconfigurationException"
        if error is cause and isinstance(error, InputError):
            raise
        if not (isinstance(cause, REFUSALS) or misconfigured):
            raise
        key = None if error is cause else re.search(r"full_key: (\S+)", str(error))
        raise InputError(f"`{key[1]}`: {cause}" if key else str(cause)) from error


def launch(
    task: Task, conf: Path | None = None, after: Callable[[], None] | None = None
) -> NoReturn:
    """Runs `task` under Hydra on the command line's config, and ends the process.

    Codes: 0 done, 2 wrong config or input, 130 interrupted, 1 anything else.

    Args:
        task: gets each job's config; returns the score that a sweep maximises.
        conf: the config tree, if not the project's own.
        after: called when all jobs ended; raises what the process is to end with.
    """
    arguments = _arguments()
    arguments.config_path = Path(arguments.config_path or conf or conf_dir()).absolute()
    arguments.config_name = arguments.config_name or "train"
    job = _Job(task, arguments.overrides)
    with raised_errors():
        try:
            code = _run(job, arguments)
            if after is not None:
                after()
        except SystemExit as stop:
            # Lightning ends an interrupted process with exit(1).
            interrupted = isinstance(stop.__context__, KeyboardInterrupt)
            code = INTERRUPTED if interrupted else stop.code
        except KeyboardInterrupt:
            _say("interrupted")
            code = INTERRUPTED
        except BrokenPipeError as error:
            if error is job.error:
                code = _failed(error, _told(error, job.debug), FAILED, job.debug)
            else:  # `unlabeled --help | head`: nobody reads on, the interpreter's flush included
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = DONE
        except InputError as error:
            code = _failed(error, str(error), WRONG_INPUT, job.debug)
        except Exception as error:
            code = _failed(error, _told(error, job.debug), FAILED, job.debug)
    sys.exit(code)


def hydra_files() -> dict[str, Any]:
    """What Hydra chose for this job, by the names it would give the files of a run's folder."""
    if not HydraConfig.initialized():
        return {}
    chosen: Any = OmegaConf.to_container(HydraConfig.instance().cfg, enum_to_str=True)["hydra"]  # type: ignore
    return {"hydra.yaml": {"hydra": chosen}, "overrides.yaml": chosen["overrides"]["task"]}


def _arguments() -> Namespace:
    """The command line, with flags anywhere among the overrides.

    Hydra, which reads it again, wants overrides in one row: `sys.argv` has them first from here.
    """
    arguments = get_args_parser().parse_intermixed_args()
    overrides, flags = list(arguments.overrides), []
    for word in sys.argv[1:]:
        if word in overrides:
            overrides.remove(word)
        elif word != "--":
            flags.append(word)
    sys.argv[1:] = [*arguments.overrides, *flags]
    return arguments


class _Job:
    """The task, which keeps a single run's error to itself.

    Hydra would print a line of its own and lose where the error is from. A sweep's errors stay
    Hydra's, since its jobs may be other processes.
    """

    def __init__(self, task: Task, overrides: list[str]) -> None:
        functools.update_wrapper(self, task)  # Hydra names the run after the task's module
        self.task = task
        wanted = any(re.fullmatch(r"\+*debug=(true|yes|on|1)", o, re.I) for o in overrides)
        self.debug = wanted or tracebacks_wanted()
        self.error: Exception | None = None
        self.began = False

    def __call__(self, cfg: DictConfig) -> float | None:
        self.began = True
        if HydraConfig.get().mode != RunMode.RUN:
            return self.task(cfg)
        self.debug = self.debug or bool(cfg.get("debug"))
        try:
            return self.task(cfg)
        except Exception as error:
            self.error = error
            return None


def _run(job: _Job, arguments: Namespace) -> int:
    where, name = arguments.config_path, arguments.config_name
    if arguments.help:
        from unlabeled.help import text  # Hydra's own composes and lists everything, slowly

        print(text(where, name))
        return DONE
    shows = arguments.hydra_help or arguments.cfg or arguments.info
    starts = not (shows or arguments.shell_completion or arguments.experimental_rerun)
    _prefer(where)
    if starts:
        _check(arguments, targets=True)
    try:
        hydra.main(version_base="1.3", config_path=str(where), config_name=name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error, InstantiationException):
            raise  # a sweep's job
        if not starts:  # `--cfg` shows any config that composes, and needs no targets
            _check(arguments, targets=False)
        raise InputError(str(error)) from error
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__  # of its log file
        if job.began or not isinstance(reason, OSError):
            raise
        what = "sweep" if arguments.multirun else "run"
        raise InputError(
            f"cannot write in the {what}'s folder ({reason}): choose another hydra.{what}.dir"
        ) from error
    if job.error is not None:
        raise job.error
    return DONE


def _prefer(conf: Path) -> None:
    """Has choices of Hydra's groups in the config tree replace those of the same name in plugins.

    Hydra would take a plugin's for the schema of ours, and refuse one with a defaults list.
    """
    Plugins.instance()  # imports them, which stores their choices
    for path in (conf / "hydra").rglob("*.yaml"):
        *groups, name = path.relative_to(conf).parts
        store: Any = ConfigStore.instance().repo
        for group in groups:
            store = store.get(group, {})
        store.pop(name, None)


def _check(arguments: Namespace, *, targets: bool) -> None:
    from unlabeled.overrides import mistakes  # `--help` does without

    found = mistakes(
        arguments.config_path,
        arguments.config_name,
        arguments.overrides,
        sweep=arguments.multirun,
        targets=targets,
        more=arguments.config_dir,
    )
    if found:
        raise InputError(summary(found))


def _failed(error: Exception, text: str, code: int, debug: bool) -> int:
    if debug:
        print(hidden("".join(traceback.format_exception(error))), file=sys.stderr)
    _say(text)
    return code


def _told(error: Exception, debug: bool) -> str:
    """What happened, without the tracebacks that some errors carry in their text."""
    lines = str(error).strip().splitlines()
    if any(line.startswith("Traceback (most recent") for line in lines):
        lines = [lines[0], lines[-1]]
    hint = "" if debug else "\n(debug=true shows the traceback)"
    return f"{type(error).__name__}: {chr(10).join(lines)}{hint}"


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"unlabeled: {hidden(text)}", file=sys.stderr)
