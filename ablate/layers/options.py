"""Types of layer options, and how a plain dict from a config becomes an options dataclass."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator

from ablate.errors import UserError, did_you_mean


def _or_none(value: Any, check: Callable[[Any], Any]) -> Any:
    return None if value is None else check(value)


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Null asks for the default, which `__post_init__` derives from other fields; an int from then on.
DerivedInt = Annotated[PositiveInt, WrapValidator(_or_none)]
DERIVED: Any = None

STRICT = ConfigDict(extra="forbid", strict=True)  # `__pydantic_config__` of an options dataclass

T = TypeVar("T")


def tile_work(T: int, chunk: int) -> tuple[int, int, int]:
    """Of a scan of T tokens in tiles: token pairs, a full square a tile; tokens that read a state,
    which those of the first tile do not; tokens that add to one, which those of the last need not.
    """
    full, rest = divmod(T, chunk)
    return full * chunk**2 + rest**2, T - min(T, chunk), (-(-T // chunk) - 1) * chunk


def heads_of(d_model: int, head_dim: int) -> int:
    """Heads as wide as the stream together, where none are given."""
    if d_model % head_dim:
        raise ValueError(
            f"head_dim {head_dim} does not divide d_model {d_model}, so n_heads must be given"
        )
    return d_model // head_dim


@functools.cache
def _adapter(options: Any) -> TypeAdapter[Any]:
    return TypeAdapter(options)


def build(
    options: type[T], d_model: int, values: Mapping[str, Any], where: str, *, used: bool = True
) -> T | None:
    """The options dataclass of a layer kind from a plain dict.

    A kind that the pattern does not use is checked field by field but need not fit the width: None
    is returned when it does not.
    Raises UserError with one sentence that names the field as `where`.field.
    """
    if "d_model" in values:
        raise UserError(
            f"{where}.d_model is {values['d_model']!r}; the width is set by arch.d_model"
        )
    try:
        # As JSON, because strict validation of Python values takes no dict for a dataclass.
        text = json.dumps({"d_model": d_model, **values}, default=str)
        return cast(T, _adapter(cast(Any, options)).validate_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error":
            if not used:
                return None
            raise UserError(f"{where}: {message}") from None
        name = str(first["loc"][0])  # never empty: the top level is a dict
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = [n for n in options.__dataclass_fields__ if n != "d_model"]  # type: ignore[attr-defined]
            raise UserError(f"unknown field '{where}.{name}'{did_you_mean(name, known)}") from None
        raise UserError(
            f"field '{where}.{name}' is {first['input']!r}: {message[0].lower()}{message[1:]}"
        ) from None
