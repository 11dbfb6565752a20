"""pipelines.yaml to frozen dataclasses: typed, and every mistake named with its place."""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from oscar_common.errors import UsageError, nearest, shorten
from oscar_common.settings import PATTERNS, Catalog
from oscar_common.text_files import read_text

FILE = "pipelines.yaml"
LONGEST = 1 << 20  # bytes of a file of settings
S = TypeVar("S")


def load_catalog(path: Path | None = None) -> Catalog:
    """Read `path`, else ./pipelines.yaml, else the copy that ships with the package.

    Raises:
        UsageError: no such file, no YAML, an unknown key, a value of the wrong type or out of range.
    """
    place = path or Path(FILE)
    if not path and not place.is_file():
        return installed_catalog()
    return parse(Catalog, read_yaml(place, "--pipelines"), str(place))


def read_yaml(path: Path, flag: str) -> Any:
    """Read a YAML file; an empty one is an empty mapping.

    Raises:
        UsageError: no such file, or no YAML.
    """
    try:
        if (size := path.stat().st_size) > LONGEST:
            raise UsageError(f"{flag} {path}: {size:,} bytes are too many for a file of settings; give a YAML file")
        return yaml.safe_load(read_text(path, flag)) or {}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give an existing file with {flag}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {shorten(str(error))}") from None


def installed_catalog() -> Catalog:
    """Read the pipelines.yaml that ships with the package."""
    text = resources.files("oscar_common").joinpath(FILE).read_text(encoding="utf-8")
    return parse(Catalog, yaml.safe_load(text), FILE)


def parse(schema: type[S], content: Any, place: str) -> S:
    """Make a dataclass from a mapping; `place` (`pipelines.yaml: pipelines.demo.train`) begins every message."""
    values = checked(schema, content, place)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values:
            raise UsageError(f"{place}: key {field.name!r} is missing")
    return schema(**values)


def checked(schema: type[Any], content: Any, place: str) -> dict[str, Any]:
    """Return those values of a dataclass' fields that a mapping has, each of its field's type and in its range."""
    if not isinstance(content, Mapping):
        raise UsageError(f"{place}: {shown(content)} is no mapping of {schema.__name__.lower()} settings")

    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key in content:
        if key not in fields:
            raise UsageError(f"{place}: unknown key {shown(key)}{nearest(str(key), fields)}")

    return {name: value(hints[name], given, f"{place}: {name}", fields[name]) for name, given in content.items()}


def shown(value: Any) -> str:
    """Return a value as part of a message; of a long one, such as all of a file that is no YAML, only the beginning."""
    return shorten(repr(value), 60)


def value(hint: Any, given: Any, place: str, field: "dataclasses.Field[Any]") -> Any:
    """Check one value against its type and its field's range, undoing what YAML does to it (5e-5 is a string there)."""
    if typing.get_origin(hint) is types.UnionType:  # X | None
        if given is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)

    if schema := field.metadata.get("values_of"):
        return checked(schema, given, place)
    if typing.get_origin(hint) is dict:
        return _entries(typing.get_args(hint)[1], given, place)
    if typing.get_origin(hint) is list:
        items = given if isinstance(given, list) else [given]  # one value stands for a list of one
        typed_items = [_scalar(typing.get_args(hint)[0], item, place) for item in items]
        check_range(typed_items, place, field)
        return typed_items
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast("type[Any]", hint), given, place)

    return meaning(given if is_word(given, field) else _scalar(hint, given, place, _or_words(field)), place, field)


def is_word(given: Any, field: "dataclasses.Field[Any]") -> bool:
    """Whether a value is one of the words that stand for a number of a field."""
    return isinstance(given, str) and given in field.metadata.get("words", ())


def meaning(given: Any, place: str, field: "dataclasses.Field[Any]") -> Any:
    """Return the number that a word stands for; anything else, if it is in the field's range, as it is."""
    if is_word(given, field):
        return field.metadata["words"][given]
    check_range(given, place, field)
    return given


def check_range(given: Any, place: str, field: "dataclasses.Field[Any]") -> None:
    """Raise a UsageError if `given`, or one of a list, is not among the field's choices or outside its range."""
    if isinstance(given, list):
        for item in given:
            check_range(item, place, field)
        return
    if given is None:
        return
    if (form := field.metadata.get("pattern")) and not re.fullmatch(PATTERNS[form][0], str(given)):
        raise UsageError(f"{place}: {shown(given)} is not {PATTERNS[form][1]}")

    choices, low, high = (field.metadata.get(k) for k in ("choices", "low", "high"))
    if choices and given not in choices:
        raise UsageError(
            f"{place}: {shown(given)} is not allowed{nearest(str(given), [str(choice) for choice in choices])}"
        )
    if (low is not None and not given >= low) or (high is not None and not given <= high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{place}: {shown(given)} is out of range; it must be {allowed}{_or_words(field)}")


def _entries(hint: Any, given: Any, place: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f"{place}: {shown(given)} is no mapping of names to entries")
    if dataclasses.is_dataclass(hint):
        return {str(k): parse(typing.cast("type[Any]", hint), v, f"{place}.{k}") for k, v in given.items()}

    return dict(given)


def _or_words(field: "dataclasses.Field[Any]") -> str:
    return "".join(f", or {word}" for word in field.metadata.get("words", ()))


def _scalar(hint: Any, given: Any, place: str, instead: str = "") -> Any:
    hint = typing.get_origin(hint) or hint
    if hint is float and isinstance(given, str | int) and not isinstance(given, bool):
        with suppress(ValueError):
            return float(given)

    if isinstance(given, hint) and (hint is bool or not isinstance(given, bool)):
        return given

    quote = "; put it in quotes" if hint is str else ""
    raise UsageError(f"{place}: {shown(given)} is no {_NAMES.get(hint, hint.__name__)}{instead}{quote}")


_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", list: "list", dict: "mapping"}
