"""The task: ``7+5=`` is answered by the two tokens ``12``, ``1+2=`` by ``03``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

PLUS, EQUALS = 10, 11  # tokens; digits are their own
VOCAB = 12
PROMPT_TOKENS, ANSWER_TOKENS = 4, 2
SUMS = 100  # that there are


def prompts(numbers: Tokens) -> Tokens:
    """Prompts by number, 0 to 99: int32[N] -> int32[N, 4].

    >>> prompts(np.array([75])).tolist()
    [[7, 10, 5, 11]]
    """
    signs = np.full_like(numbers, PLUS), np.full_like(numbers, EQUALS)
    return np.stack([numbers // 10, signs[0], numbers % 10, signs[1]], axis=1)


def answers(asked: Tokens) -> Tokens:
    """What is right: int32[N, 4] -> int32[N, 2].

    >>> answers(prompts(np.array([75, 12]))).tolist()
    [[1, 2], [0, 3]]
    """
    sums = asked[:, 0] + asked[:, 2]
    return np.stack([sums // 10, sums % 10], axis=1)


def rewards(asked: Tokens, given: Tokens) -> npt.NDArray[np.float32]:
    """1 for each answer that is right in both tokens, else 0: f32[N]."""
    return (answers(asked) == given).all(axis=1).astype(np.float32)
