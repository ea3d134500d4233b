"""Time limits that users give."""

from __future__ import annotations

# 30 years: the engine and the GPUs count in nanoseconds, and every wait has an end.
LIMIT_MAX_S = 1e9


def checked_limit(op: str, timeout_s: float, otherwise: str = "") -> float:
    """``timeout_s`` in seconds; raises ValueError that names ``op``.

    Example::

      checked_limit("jf.put", 0.5)  # 0.5
      checked_limit("jf.put", float("inf"))  # ValueError
    """
    if not 0 < timeout_s <= LIMIT_MAX_S:
        raise ValueError(
            f"{op}: timeout_s={timeout_s} must be above 0 seconds and at most "
            f"{LIMIT_MAX_S:g}{otherwise}"
        )
    return float(timeout_s)
