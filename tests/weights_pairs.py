"""Random pairs of shardings over one transport, each pushed twice.

python weights_pairs.py TRANSPORT EXAMPLES
"""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer_cases import PATIENCE_S
from weights_cases import assert_tiles, jobs, two_layouts, whole_arrays


def check_pairs(transport: str, examples: int) -> None:
    """Each rank takes its tiles of what was pushed, to the bit."""

    @given(layouts=two_layouts(), seed=st.integers(0, 99))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def holds(layouts: Any, seed: int) -> None:
        source, target = layouts
        with jobs(transport, source, target, bucket_bytes=1 << 18) as both:
            for version in (1, 2):
                arrays = whole_arrays(source, seed + version)
                for push in both.push(arrays, version):
                    push.wait(PATIENCE_S)
                for taken in both.take(version).values():
                    assert taken.version == version
                    assert_tiles(target, arrays, taken.params)

    holds()


if __name__ == "__main__":
    check_pairs(sys.argv[1], int(sys.argv[2]))
    print("all equal")
