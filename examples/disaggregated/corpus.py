"""The text that the model learns, and prompts are taken from."""

from __future__ import annotations

import pydoc_data.topics

import numpy as np


def text() -> np.ndarray:
    """CPython's documentation, a byte a token: int32[T]."""
    topics = pydoc_data.topics.topics
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return np.frombuffer(joined.encode(), np.uint8).astype(np.int32)
