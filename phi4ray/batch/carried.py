"""Columns carried through from inputs to parts: their types over all inputs, and their values.

JSON members are bool, int64, double (also for a mix of integers and reals) or string; anything
mixed or nested becomes a string of JSON. Parquet columns keep their Arrow type, see
`lasting`. Where files disagree, Arrow's permissive promotion decides, and where that fails, or one
of them has text, the column is text; so it is where a value may not fit, as far years do not in ns.
"""

import base64
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from phi4ray.batch.rows import RESERVED, as_text, request_members
from phi4ray.errors import ConfigError
from phi4ray.protocol import Json, RowError

UNREADABLE = (ValueError, ArithmeticError, TypeError, LookupError)
"""What Arrow raises of values that are broken, or that Python has not: text that is not UTF-8,
dates after 9999, times of unknown zones, maps with lists for keys, structs that name a member
twice."""


def encode_schema(schema: pa.Schema) -> str:
    """An Arrow schema as text, for the plan file."""
    return base64.b64encode(schema.remove_metadata().serialize()).decode()


def decode_schema(text: str) -> pa.Schema:
    """The schema that `encode_schema` wrote; plans of earlier versions have types that do not last.

    Raises:
        ConfigError: it did not write this.
    """
    try:
        return lasting(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text))))
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"the plan's carried columns cannot be read ({error}): restore _plan.json, or use a "
            "new --output"
        ) from error


def json_kind(value: object) -> str:
    """What `carried_schema` must know of a JSON value."""
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int():
            return "int" if -(2**63) <= value < 2**63 else "json"
        case float():
            return "float"
        case str():
            return "str"
        case _:
            return "json"


def carried_schema(
    kinds: Iterable[Mapping[str, set[str]]], schemas: Iterable[pa.Schema]
) -> pa.Schema:
    """The carried columns, from the kinds of JSON members and the schemas of Parquet files."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    types: defaultdict[str, list[pa.DataType]] = defaultdict(list)
    for members in kinds:
        for name, found in members.items():
            seen[name] |= found
    for schema in schemas:
        for column in schema:
            if column.type not in types[column.name]:
                types[column.name].append(column.type)
    for name, found in seen.items():
        types[name].append(_json_type(found - {"null"}))
    return pa.schema([(name, _common_type(types[name])) for name in sorted(types)])


def lasting(schema: pa.Schema) -> pa.Schema:
    """The columns with types of which pieces, of whatever files, can always be put together.

    Dictionaries count their values in 32 bits: pandas counts up to 127 categories in 8, which all
    files together soon pass. Those within lists and structs become their values: Arrow puts them
    together wrongly. Members may be null, as they are where the column is absent.
    """
    return pa.schema([(column.name, _common_type([column.type])) for column in schema])


def _lasting(kind: pa.DataType, *, nested: bool = False) -> pa.DataType:
    types = pa.types

    def member(field: pa.Field) -> pa.Field:
        return field.with_type(_lasting(field.type, nested=True)).with_nullable(True)

    if types.is_dictionary(kind):
        if nested:
            return _lasting(kind.value_type, nested=True)
        return pa.dictionary(pa.int32(), kind.value_type, kind.ordered)
    if types.is_struct(kind):
        return pa.struct([member(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(_lasting(kind.key_type, nested=True), member(kind.item_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(member(kind.value_field), kind.list_size)
    if types.is_list(kind):
        return pa.list_(member(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(member(kind.value_field))
    is_view = types.is_list_view(kind) or types.is_large_list_view(kind)
    return pa.string() if is_view and "dictionary<" in str(kind) else kind  # Arrow decodes no view


def _json_type(kinds: set[str]) -> pa.DataType:
    if not kinds:
        return pa.null()
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int"}:
        return pa.int64()
    return pa.float64() if kinds <= {"int", "float"} else pa.string()


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    kinds = [kind for kind in types if not pa.types.is_null(kind)]
    if not kinds or pa.string() in kinds:
        return pa.string()
    try:
        common = pa.unify_schemas(
            [pa.schema([("", _lasting(kind))]) for kind in kinds], promote_options="permissive"
        ).types[0]
        for kind in kinds:  # what can be promoted can yet not always be converted
            pa.nulls(1, kind).cast(common)
    except pa.ArrowException:
        return pa.string()
    wide = dict(_leaves(common))
    leaves = [leaf for kind in kinds for leaf in _leaves(_lasting(kind))]
    fit = all(_fits(leaf, wide.get(path), nested=bool(path)) for path, leaf in leaves)
    return common if fit else pa.string()


def _leaves(kind: pa.DataType, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The types within a type that have no members, by where they are."""
    if not pa.types.is_nested(kind):
        yield path, kind
        return
    for at in range(kind.num_fields):
        field = kind.field(at)
        yield from _leaves(field.type, (*path, field.name if pa.types.is_struct(kind) else at))


def _fits(leaf: pa.DataType, common: pa.DataType | None, *, nested: bool) -> bool:
    """Whether the type that Arrow promotes to holds every value."""
    types = pa.types
    if types.is_timestamp(leaf) or types.is_duration(leaf):
        return bool(leaf == common)  # a finer unit has fewer years
    if types.is_uint64(leaf):  # Arrow takes int64 for both
        return not (types.is_signed_integer(common) or (nested and types.is_floating(common)))
    return not (nested and types.is_int64(leaf) and types.is_floating(common))


def carried_table(rows: Sequence[Json | RowError], schema: pa.Schema) -> pa.Table:
    """The carried members of decoded lines."""
    arrays = []
    for column in schema:
        values = [_member(row, column.name) for row in rows]
        if pa.types.is_string(column.type):
            values = [as_text(value) for value in values]
        elif pa.types.is_floating(column.type):
            values = [None if value is None else float(value) for value in values]
        arrays.append(pa.array(values, column.type))
    return pa.table(arrays, schema=schema)


def _member(row: Json | RowError, name: str) -> Any:
    if isinstance(row, RowError) or (name in RESERVED and name in request_members(row)):
        return None
    return row.get(name)


def conform(table: pa.Table, schema: pa.Schema) -> tuple[pa.Table, dict[int, RowError]]:
    """Bring a Parquet table's carried columns to the job's types; absent ones become null.

    Values that cannot be carried, such as text that is not UTF-8, become null too; the errors
    of their rows come with the table, by row.
    """
    broken: dict[int, RowError] = {}
    arrays: list[Any] = []
    for column in schema:
        if column.name not in table.column_names:
            arrays.append(pa.nulls(table.num_rows, column.type))
            continue
        found = table[column.name]
        try:
            arrays.append(_as_type(found, column.type))
        except UNREADABLE:
            cells: list[Any] = []
            for at in range(table.num_rows):
                cell = found.slice(at, 1).combine_chunks()
                if pa.types.is_dictionary(cell.type):  # it may hold other rows' broken values
                    cell = cell.dictionary_decode()
                try:
                    cells.append(_as_type(cell, column.type))
                except UNREADABLE as error:
                    cells.append(pa.nulls(1, column.type))
                    broken[at] = _broken(cell, column.name, error)
            arrays.append(pa.chunked_array(cells, column.type))
    return pa.table(arrays, schema=schema), broken


def _broken(cell: Any, name: str, error: Exception) -> RowError:
    try:
        cell.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        return RowError("invalid_utf8", f"column {name!r} holds text that is not UTF-8")
    except UNREADABLE:
        pass
    return RowError("invalid_value", f"the value of column {name!r} does not fit: {error}")


def _as_type(found: Any, kind: pa.DataType) -> Any:
    found.validate(full=True)  # Arrow does not check that Parquet strings are UTF-8
    if found.type == kind:
        return found
    if pa.types.is_string(kind) and _needs_json(found.type):
        values = found.to_pylist(maps_as_pydicts="lossy")
        return pa.array([as_text(value) for value in values], kind)
    # Integers among reals may lose their last digits, as in any column of reals.
    return found.cast(kind, safe=not pa.types.is_floating(kind))


def _needs_json(kind: pa.DataType) -> bool:
    """Whether Arrow has no text for values of this type."""
    types = pa.types
    binary = (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )
    return binary or types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)
