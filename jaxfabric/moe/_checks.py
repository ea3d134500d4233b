"""Argument checks of dispatch and combine: before anything is bound, in Python.

Each message says what was asked, what was found, and the line to change.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from jaxfabric._time_limit import checked_limit
from jaxfabric.moe import _wire
from jaxfabric.moe._plan import Config

ROW_DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = ("fabric", "reference", "ragged")


def positive(op: str, what: str, value: Any, way_out: str) -> None:
    """Raises unless value is an int of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{op}: {what} must be an int, got {type(value).__name__} {value!r}; "
            f"{way_out}"
        )
    if value < 1:
        raise ValueError(f"{op}: {what} must be at least 1, got {value}; {way_out}")


def rows(op: str, what: str, x: jax.Array, way_out: str) -> None:
    """Raises unless x is a matrix of rows in a supported dtype."""
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"{op}: {what} must be a non-empty matrix, got shape {x.shape}; {way_out}"
        )
    if x.dtype.name not in ROW_DTYPES:
        raise TypeError(
            f"{op}: {what} must be one of {', '.join(ROW_DTYPES)}, got {x.dtype.name}; "
            f"cast it, as in {what}.astype(jnp.float32)"
        )


def routes(op: str, x: jax.Array, ids: jax.Array, weights: jax.Array) -> None:
    """Checks ids and weights against x and each other."""
    for what, value, dtype in (("ids", ids, "int32"), ("weights", weights, "float32")):
        if value.dtype.name != dtype:
            raise TypeError(
                f"{op}: {what} must be {dtype}, got {value.dtype.name}; pass "
                f"{what}.astype(jnp.{dtype})"
            )
        if value.ndim != 2 or value.shape[0] != x.shape[0] or 0 in value.shape:
            raise ValueError(
                f"{op}: {what} must be [T, K] with T = {x.shape[0]} rows as x has, "
                f"got shape {value.shape}; give each token K >= 1 entries"
            )
    if ids.shape != weights.shape:
        raise ValueError(
            f"{op}: ids have shape {ids.shape} but weights {weights.shape}; they must "
            "be equal: one weight for each id"
        )


def combined_rows(op: str, count: int, c: Config, expand: bool, weighted: bool) -> None:
    """Checks how many rows combine is given."""
    if not expand and weighted:
        raise ValueError(
            f"{op}: expand=False takes rows that the program has weighted and summed; "
            "say so with weighted=False"
        )
    wanted = ("R", c.rows, "expert row, the padding included")
    if not expand:
        wanted = ("N*T", c.unique_rows, "row of a dispatch with expand=False")
    if count != wanted[1]:
        shown = c.axis_name[0] if len(c.axis_name) == 1 else c.axis_name
        raise ValueError(
            f"{op}: {count} rows, but the plan over axis {shown!r} has {wanted[0]} = "
            f"{wanted[1]}; pass one row for each {wanted[2]}"
        )


def experts(
    op: str, axis: tuple[str, ...], num_experts: int, ranks: int, k: int
) -> None:
    """Checks the number of experts against ranks and experts per token."""
    shown = axis[0] if len(axis) == 1 else axis
    positive(op, "num_experts", num_experts, "it counts the experts of all ranks")
    if num_experts % ranks:
        raise ValueError(
            f"{op}: num_experts={num_experts} is not divisible by the {ranks} ranks of "
            f"axis {shown!r}; change num_experts= or the size of the axis"
        )
    if k > num_experts:
        raise ValueError(
            f"{op}: {k} experts per token (the last dimension of ids) but "
            f"num_experts={num_experts}; an expert may appear once in a token"
        )


def choice(op: str, implementation: str | None) -> None:
    """Checks the name of an implementation."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation={implementation!r} is unknown; use None or one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}"
        )


def wire(op: str, wire_dtype: Any, dequantize: bool) -> str | None:
    """The name of the wire's dtype, ``None`` for the rows' own."""
    if wire_dtype is None:
        if not dequantize:
            raise ValueError(
                f"{op}: dequantize=False keeps rows as they came over the wire, but "
                "they come as they are; add wire_dtype=jnp.float8_e4m3fn"
            )
        return None
    dtype = jnp.dtype(wire_dtype)
    if dtype != _wire.DTYPE:
        raise ValueError(
            f"{op}: wire_dtype={dtype.name} is not supported; use "
            "jnp.float8_e4m3fn, or None to send rows as they are"
        )
    return dtype.name


def call(op: str, name: Any, key: Any, timeout_s: float | None) -> None:
    """Checks what identifies and bounds a call."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"{op}: name must be a non-empty str, got {name!r}")
    if not isinstance(key, Hashable):
        raise TypeError(
            f"{op}: key must be a static hashable value (a str or an int), got "
            f"{type(key).__name__}"
        )
    if timeout_s is not None:
        checked_limit(op, timeout_s, "; None inherits the Fabric's")


def token(op: str, value: jax.Array | None) -> jax.Array:
    """Makes a token if there is none; raises TypeError for anything else."""
    if value is None:
        return jnp.zeros(1, jnp.float32)
    value = jnp.asarray(value)
    if value.shape != (1,) or value.dtype != jnp.float32:
        raise TypeError(
            f"{op}: token must be float32[1], got {value.dtype.name}"
            f"{list(value.shape)}; start with jf.token() and pass on what calls return"
        )
    return value


def accumulator(op: str, dtype: Any) -> jnp.dtype:
    """Checks accum_dtype."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in ROW_DTYPES:
        raise TypeError(
            f"{op}: accum_dtype must be one of {', '.join(ROW_DTYPES)}, got "
            f"{dtype.name}; jnp.float32 is the default"
        )
    return dtype
