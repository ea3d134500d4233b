"""The MoE contract in plain Python loops, for tests: no JAX, nothing vectorised.

Written from the rules in jaxfabric/moe/_plan.py, not from any implementation, so that
the reference implementation is checked against something else than itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class RankOut:
    """What one rank gets from dispatch."""

    tokens: np.ndarray
    group_sizes: np.ndarray
    weights: np.ndarray
    row_index: np.ndarray | None
    recv_count: np.ndarray
    slot_row: np.ndarray
    sent: np.ndarray
    dropped: int
    # (source, token, k) of each expert row, None in padding and tail.
    origin: list[tuple[int, int, int] | None]
    # (source, token) of each unique row.
    unique: list[tuple[int, int]]


def num_rows(
    n: int, t: int, k: int, local: int, capacity: int | None, alignment: int
) -> int:
    """R."""
    most = n * t * min(k, local)
    if capacity is not None and capacity < most:
        most = capacity
    rows = most + local * (alignment - 1)
    return rows - rows % alignment


def dispatch(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    num_experts: int,
    *,
    capacity: int | None = None,
    alignment: int = 1,
    expand: bool = True,
) -> list[RankOut]:
    """x[N, T, D], ids[N, T, K], weights[N, T, K] of all ranks -> list of RankOut."""
    n, t, d = x.shape
    k = ids.shape[2]
    local = num_experts // n
    slots = min(k, local)
    rows = num_rows(n, t, k, local, capacity, alignment)
    result = []
    for rank in range(n):
        mine = range(rank * local, (rank + 1) * local)
        unique: list[tuple[int, int]] = []
        arrivals: list[tuple[int, int, int, int, int]] = []
        recv = np.zeros(n, np.int32)
        for s in range(n):
            for i in range(t):
                hits = [j for j in range(k) if ids[s, i, j] in mine]
                if not hits:
                    continue
                for q, j in enumerate(hits):
                    arrivals.append((s, i, j, len(unique), q))
                unique.append((s, i))
                recv[s] += 1
        kept = arrivals if capacity is None else arrivals[:capacity]
        groups = [[a for a in kept if ids[a[0], a[1], a[2]] == e] for e in mine]
        row_index = np.full(rows, -1, np.int32)
        out = RankOut(
            tokens=np.zeros((rows, d), x.dtype),
            group_sizes=np.zeros(local, np.int32),
            weights=np.zeros(rows, np.float32),
            row_index=None if expand else row_index,
            recv_count=recv,
            slot_row=np.full((n * t, slots), -1, np.int32),
            sent=np.zeros(n, np.int32),
            dropped=len(arrivals) - len(kept),
            origin=[None] * rows,
            unique=unique,
        )
        row = 0
        for e, group in enumerate(groups):
            start = row
            for s, i, j, u, q in group:
                out.tokens[row] = x[s, i]
                out.weights[row] = weights[s, i, j]
                row_index[row] = u
                out.slot_row[u, q] = row
                out.origin[row] = (s, i, j)
                row += 1
            while (row - start) % alignment:
                row += 1
            out.group_sizes[e] = row - start
        if not expand:
            out.tokens = np.zeros((n * t, d), x.dtype)
            for u, (s, i) in enumerate(unique):
                out.tokens[u] = x[s, i]
        for dst in range(n):
            theirs = range(dst * local, (dst + 1) * local)
            out.sent[dst] = sum(
                any(e in theirs for e in ids[rank, i]) for i in range(t)
            )
        result.append(out)
    return result


def combine(
    rows: np.ndarray,
    outs: list[RankOut],
    shape: tuple[int, ...],
    *,
    weighted: bool = True,
) -> np.ndarray:
    """rows[N, R, D] and dispatch's result -> y[N, T, D], in float64 sums."""
    y = np.zeros(shape, np.float64)
    for out, mine in zip(outs, rows, strict=True):
        partial: dict[tuple[int, int], np.ndarray] = {}
        for row, origin in enumerate(out.origin):
            if origin is None:
                continue
            s, i, _ = origin
            w = np.float64(out.weights[row]) if weighted else 1.0
            value = w * mine[row].astype(np.float64)
            partial[s, i] = partial.get((s, i), np.zeros_like(value)) + value
        for (s, i), value in partial.items():
            # What travels is rounded to the dtype of the rows.
            y[s, i] += value.astype(rows.dtype).astype(np.float64)
    return y


ROUTINGS = (
    "random",
    "one_expert",
    "one_rank",
    "empty_experts",
    "skips",
    "empty_ranks",
    "uneven",
    "nothing",
)


def routing(
    kind: str, rng: np.random.Generator, n: int, t: int, k: int, num_experts: int
) -> np.ndarray:
    """ids int32[n, t, k] of a named kind; no expert twice in a token."""
    ids = np.stack([rng.permutation(num_experts)[:k] for _ in range(n * t)])
    ids = ids.reshape(n, t, k).astype(np.int32)
    local = num_experts // n
    if kind == "one_expert":
        ids[:] = -1
        ids[..., rng.integers(k)] = num_experts - 1
    elif kind == "one_rank":
        ids[:] = -1
        few = min(k, local)
        for s in range(n):
            for i in range(t):
                ids[s, i, rng.permutation(k)[:few]] = rng.permutation(local)[:few]
    elif kind == "empty_experts":
        ids[ids % 2 == 1] = -1
    elif kind == "skips":
        ids[rng.random(ids.shape) < 0.5] = -1
    elif kind == "empty_ranks":
        ids[::2] = -1
    elif kind == "uneven":
        for s in range(n):
            ids[s, rng.integers(t + 1) :] = -1
    elif kind == "nothing":
        ids[:] = -1
    else:
        assert kind == "random", kind
    return ids
