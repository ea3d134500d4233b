"""Sizes of the models that are served; light, since every job reads it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The fields of moe_transformer.Config, with what is served here."""

    length: int  # tokens of a prompt and its answer, at most
    d_model: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_experts: int
    num_experts_per_tok: int = 2
    vocab: int = 256


# "small" is what is measured: 1024 tokens take some hundred milliseconds on two cores.
SIZES = {
    "small": Sizes(2304, 128, 512, num_heads=4, num_layers=4, num_experts=8),
    "tiny": Sizes(192, 32, 48, num_heads=4, num_layers=3, num_experts=4),
}
