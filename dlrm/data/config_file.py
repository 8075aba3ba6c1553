"""The configuration file: what a source's columns are, and what training does differently from the defaults.

[data]
source = ["clicks/*.csv"]            # from the folder of this file
format = "csv"
label = "clicked"

[data.numeric]
price = "log1p_standardise"          # or {transform = "quantile", missing_indicator = true}

[data.categorical]
city = "dictionary"                  # or {min_count = 5}, {ids = "hash", num_rows = 100000}, ...

[train]
epochs = 2
model = {dim = 32}
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import cattrs
from cattrs.gen import make_dict_structure_fn

from dlrm.data.schema import DataSchema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from dlrm.config import RunConfig

T = TypeVar("T")
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What a configuration file says.

    Attributes:
        path: of the file.
        schema: of the data.
        sources: its files, folders or globs.
        train: the table `[train]` as it stands.
    """

    path: Path
    schema: DataSchema
    sources: tuple[Path, ...]
    train: dict[str, Any] = field(default_factory=dict)

    def run_config(self) -> RunConfig:
        """Return the configuration that `recforge train` runs: the defaults, changed by `[train]`.

        Raises:
            ValueError: `[train]` has an unknown key or a value of another type.
        """
        from dlrm.config import RunConfig

        return _structure(self.train, RunConfig, f"{self.path}: [train]")


def load_config(path: Path | str) -> ConfigFile:
    """Read a configuration file.

    Raises:
        ValueError: the file is absent, is no TOML, or a key is unknown, missing or has a value of another type; the key
            is named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a configuration file at {path}, found none; `recforge init DATA` writes one")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    unknown = sorted(content.keys() - {"data", "train"})
    if unknown or not isinstance(content.get("data"), dict) or not isinstance(content.get("train", {}), dict):
        found = ", ".join(f"[{name}]" if isinstance(content[name], dict) else name for name in content) or "nothing"
        raise ValueError(f"{path}: expected the tables [data] and, if need be, [train], found {found}; correct it")
    data = dict(content["data"])
    sources = data.pop("source", None)
    if isinstance(sources, str):
        sources = [sources]
    if not isinstance(sources, list) or not sources or not all(isinstance(source, str) for source in sources):
        raise ValueError(f'{path}: [data] expected source = ["FILE", ...], got {sources!r}')
    for kind, shorthand in (("numeric", "transform"), ("categorical", "ids")):
        data[kind] = _name_columns(path, kind, data.get(kind, {}), shorthand)
    schema = _structure(data, DataSchema, f"{path}: [data]")
    places = tuple(path.parent / source for source in sources)
    return ConfigFile(path=path, schema=schema, sources=places, train=dict(content.get("train", {})))


def _name_columns(path: Path, kind: str, columns: Any, shorthand: str) -> list[dict[str, Any]]:
    """Turn `NAME = "log1p"` and `NAME = {transform = "log1p"}` into the fields of a column."""
    if not isinstance(columns, dict):
        raise ValueError(f"{path}: expected a table [data.{kind}] with a line per column, got {columns!r}")
    for name, value in columns.items():
        if not isinstance(value, (str, dict)):
            raise ValueError(f'{path}: [data.{kind}] expected {name} = "..." or {{...}}, got {value!r}')
    return [
        {"name": name} | (value if isinstance(value, dict) else {shorthand: value}) for name, value in columns.items()
    ]


def _structure(values: Mapping[str, Any], kind: type[T], place: str) -> T:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook_factory(_is_dataclass, lambda cls: _structure_strictly(cls, converter))
    converter.register_structure_hook_func(_is_choice, _take_choice)
    for scalar in (int, float, bool, str):
        converter.register_structure_hook(scalar, _take_scalar)
    try:
        return converter.structure(values, kind)
    except Exception as error:
        problem, _, where = cattrs.transform_error(error, format_exception=_describe)[0].rpartition(" @ $")
        column = re.match(r"\.(numeric|categorical)\[(\d+)\]", where)
        if column:
            where = f".{column[1]}.{values[column[1]][int(column[2])]['name']}{where[column.end() :]}"
        raise ValueError(f"{place} {where.lstrip('.')}{': ' if where else ''}{problem}") from error


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _structure_strictly(kind: type[Any], converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    structure = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

    def check(values: Any, _: Any) -> Any:
        if not isinstance(values, Mapping):
            raise ValueError(f"expected a table with {', '.join(item.name for item in fields(kind))}, got {values!r}")
        return structure(values, kind)

    return check


def _take_choice(value: Any, kind: Any) -> Any:
    if value not in get_args(kind):
        raise ValueError(f"expected one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
    return value


def _take_scalar(value: Any, kind: type[T]) -> T:
    """Take a value of its own type only: cattrs would make "no" a true bool, and 1.5 the int 1."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)  # type: ignore[call-arg]
    if type(value) is not kind:
        raise ValueError(f"expected {KINDS[kind]}, got {value!r}")
    return value


def _describe(error: BaseException, _: type | None) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = ", ".join(item.name for item in fields(error.cl))
        return f"unknown key {', '.join(sorted(error.extra_fields))}; known are {known}"
    if isinstance(error, KeyError):
        return "expected this key, found none"
    if isinstance(error, TypeError):
        return f"expected a list ({error})"
    return str(error)
