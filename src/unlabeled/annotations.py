"""Whether plain values fit annotations, and how to say so."""

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

SCALARS = (int, float, bool, str, type(None), Path)
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
WORDS |= {type(None): "null", Path: "a path", list: "a list", tuple: "a list", dict: "a mapping"}


def mistake(value: Any, annotation: Any) -> str:
    """What was expected instead of a value; empty if it fits, or if nobody can tell."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # not for `--help`

    try:
        adapter = TypeAdapter(_strict(annotation), config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # an annotation that only type checkers understand
        return ""
    try:
        adapter.validate_python(value)
    except ValidationError:
        choices = [c for part in _parts(annotation) for c in _literals(part)]
        near = nearest(value, choices) if isinstance(value, str) else None
        hint = f"; did you mean {near}?" if near else ""
        return f"expected {expected(annotation)}{hint}"
    return ""


def nearest(name: str, names: Iterable[Any]) -> str | None:
    """The one of `names` that `name` most likely means, if any is close."""
    known = sorted({str(n) for n in names} - {name})
    if close := difflib.get_close_matches(name, known, 1, 0.6):
        return close[0]
    longer = [n for n in known if len(name) > 2 and n.startswith(name)]
    return longer[0] if len(longer) == 1 else None


def _parts(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _literals(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def plain(annotation: Any) -> bool:
    """Whether an annotation is made of what YAML can write."""
    if annotation in (*SCALARS, Any, list, dict, tuple, ...):
        return True
    origin = get_origin(annotation)
    if origin is Literal:
        return True
    holds = (Union, types.UnionType, list, tuple, dict, Sequence, Mapping, Iterable)
    return origin in holds and all(plain(a) for a in get_args(annotation))


def _strict(annotation: Any) -> Any:
    """The annotation without pydantic's conversions of scalars: "1" and true are no numbers."""
    if annotation in (int, float, bool, str):
        from pydantic import Strict

        return Annotated[annotation, Strict()]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return Union[tuple(_strict(a) for a in args)]  # noqa: UP007 (built at run time)
    if origin in (list, tuple, dict, Sequence, Mapping, Iterable):
        return origin[tuple(_strict(a) for a in args)]  # type: ignore[index]
    return annotation


def expected(annotation: Any) -> str:
    """An annotation in words."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return listed(args, "or")
    if origin in (Union, types.UnionType):
        return " or ".join(expected(a) for a in args)
    if origin is tuple and ... not in args:
        return f"[{', '.join(expected(a) for a in args)}]"
    if origin in (list, tuple, Sequence, Iterable):
        return f"a list, each {expected(args[0])}"
    if origin in (dict, Mapping):
        return f"a mapping to {expected(args[1])}"
    return f"a node with `_target_` that builds a {getattr(annotation, '__name__', annotation)}"


def shown(value: Any) -> str:
    """A value as it is written on the command line, shortened."""
    text = str(value) if isinstance(value, (str, int, float)) else repr(value)
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Iterable[Any], last: str = "and") -> str:
    """Names as a phrase."""
    *head, tail = [str(n) for n in names] or ["nothing"]
    return f"{', '.join(head)} {last} {tail}" if head else tail


def near_miss(key: str, meant: str) -> str:
    """What to say of a key that is not there: its last part alone, if only that is wrong."""
    parent, _, last = key.rpartition(".")
    above, _, right = meant.rpartition(".")
    if parent and parent == above:
        return f"`{last}`: did you mean `{right}`? (`{key}`)"
    return f"`{key}`: did you mean `{meant}`?"
