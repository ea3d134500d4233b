"""The models of `bench weights`: layouts of a trainer's and of a sampler's shards."""

from __future__ import annotations

import dataclasses
import math

from jaxfabric.weights import LeafLayout, MeshLayout, TreeLayout
from jaxfabric.weights._buckets import scale_shape

LAYERS = 8
EXPERTS = 8
_SHAPES = ("wq", "wk", "wv", "wo")
_UNIT = 128  # of a width
Spec = tuple[tuple[str, ...], ...]


def width_for(nbytes: int) -> int:
    """The width of a model of about so many bytes.

    A layer has four matrices d x d and three of 8 experts, d x d/2 each, in bfloat16.

    >>> width_for(1 << 30)
    2048
    """
    width = math.sqrt(nbytes / (2 * LAYERS * (len(_SHAPES) + 3 * EXPERTS / 2)))
    return max(1, round(width / _UNIT)) * _UNIT


def layouts(
    nbytes: int, sources: int, targets: int, *, quantise: bool = False
) -> tuple[TreeLayout, TreeLayout]:
    """The same model, sharded by a trainer over rows and experts, by a sampler's heads.

    Args:
      nbytes: about, of all parameters.
      sources, targets: ranks of either; powers of two up to 8.
      quantise: the sampler's is e4m3; leaves of scales follow all others.
    """
    rows = 2 if sources > 1 else 1
    trainer = MeshLayout(
        (("fsdp", rows), ("expert", sources // rows)), tuple(range(sources))
    )
    sampler = MeshLayout((("tensor", targets),), tuple(range(targets)))
    d = width_for(nbytes)
    leaves: tuple[list[LeafLayout], list[LeafLayout]] = ([], [])

    def add(name: str, shape: tuple[int, ...], ours: Spec, theirs: Spec) -> None:
        leaves[0].append(LeafLayout(name, shape, "bfloat16", 0, ours))
        leaves[1].append(LeafLayout(name, shape, "bfloat16", 0, theirs))

    for layer in range(LAYERS):
        for name in _SHAPES:
            cut: Spec = (("tensor",), ()) if name == "wo" else ((), ("tensor",))
            add(f"layers.{layer}.{name}", (d, d), (("fsdp",), ("expert",)), cut)
        for name in ("w_gate", "w_up", "w_down"):
            shape = (EXPERTS, d // 2, d) if name == "w_down" else (EXPERTS, d, d // 2)
            add(
                *(f"layers.{layer}.{name}", shape),
                (("expert",), ("fsdp",), ()),
                (("tensor",), (), ()),
            )
    if quantise:
        leaves[1][:] = _quantised(leaves[1])
    return TreeLayout((trainer,), tuple(leaves[0])), TreeLayout(
        (sampler,), tuple(leaves[1])
    )


def _quantised(leaves: list[LeafLayout]) -> list[LeafLayout]:
    payloads = [dataclasses.replace(leaf, dtype="float8_e4m3fn") for leaf in leaves]
    return payloads + [
        dataclasses.replace(
            leaf,
            name=SCALES.format(leaf.name),
            shape=scale_shape(leaf.shape),
            dtype="float32",
        )
        for leaf in leaves
    ]


# --- A model of 10**12 parameters, with the shapes of Kimi-K2's published config ---

_HIDDEN, _VOCAB, _ALL_LAYERS, _DENSE_LAYERS = 7168, 163840, 61, 1
_ALL_EXPERTS, _EXPERT_WIDTH, _DENSE_WIDTH = 384, 2048, 18432
_HEADS, _HEAD, _ROPE, _Q_RANK, _KV_RANK = 64, 128, 64, 1536, 512
_BLOCK = 128  # of quantised leaves
SCALES = "{}_scale_inv"
_STAGES, _FSDP, _TRAINER_EXPERTS = 2, 16, 8
_REPLICAS, _SAMPLER_EXPERTS = 4, 32


def large_layouts() -> tuple[TreeLayout, TreeLayout]:
    """10**12 parameters, of 256 ranks in bfloat16 and of 128 in e4m3 with scales.

    The trainer has two pipeline stages of 16 (rows) x 8 (experts) ranks, the sampler
    four replicas of 32 ranks, among which the experts are split.
    """
    per_stage = _FSDP * _TRAINER_EXPERTS
    stages = tuple(
        MeshLayout(
            (("fsdp", _FSDP), ("expert", _TRAINER_EXPERTS)),
            tuple(range(stage * per_stage, (stage + 1) * per_stage)),
        )
        for stage in range(_STAGES)
    )
    sampler = MeshLayout(
        (("replica", _REPLICAS), ("expert", _SAMPLER_EXPERTS)),
        tuple(range(_REPLICAS * _SAMPLER_EXPERTS)),
    )
    ours, theirs = [], []
    for name, shape, stage, quantised in _large_leaves():
        ours.append(LeafLayout(name, shape, "bfloat16", stage, _trainer_cut(shape)))
        cut: Spec = (("expert",), (), ()) if len(shape) == 3 else ((),) * len(shape)
        dtype = "float8_e4m3fn" if quantised else "bfloat16"
        theirs.append(LeafLayout(name, shape, dtype, 0, cut))
        if quantised:
            blocks = tuple(-(-size // _BLOCK) for size in shape[-2:])
            scaled = (*shape[:-2], *blocks)
            theirs.append(LeafLayout(SCALES.format(name), scaled, "float32", 0, cut))
    return TreeLayout(stages, tuple(ours)), TreeLayout((sampler,), tuple(theirs))


def _trainer_cut(shape: tuple[int, ...]) -> Spec:
    """Cuts between blocks only, since a block has one scale."""
    cut: list[tuple[str, ...]] = [()] * len(shape)
    if len(shape) == 3:
        cut[0] = ("expert",)
    for axis in range(len(shape))[-2:]:
        if shape[axis] % (_FSDP * _BLOCK) == 0:
            cut[axis] = ("fsdp",)
            return tuple(cut)
    if len(shape) == 2 and shape[0] % (_TRAINER_EXPERTS * _BLOCK) == 0:
        cut[0] = ("expert",)
    return tuple(cut)


def _large_leaves() -> list[tuple[str, tuple[int, ...], int, bool]]:
    """Name, shape, pipeline stage, and whether it is quantised."""
    last = _STAGES - 1
    found: list[tuple[str, tuple[int, ...], int, bool]] = [
        ("embed", (_VOCAB, _HIDDEN), 0, False),
        ("head", (_VOCAB, _HIDDEN), last, False),
        ("norm", (_HIDDEN,), last, False),
    ]
    attention = {
        "q_a": (_HIDDEN, _Q_RANK),
        "q_b": (_Q_RANK, _HEADS * (_HEAD + _ROPE)),
        "kv_a": (_HIDDEN, _KV_RANK + _ROPE),
        "kv_b": (_KV_RANK, _HEADS * 2 * _HEAD),
        "o": (_HEADS * _HEAD, _HIDDEN),
    }
    for layer in range(_ALL_LAYERS):
        stage = layer * _STAGES // _ALL_LAYERS
        prefix = f"layers.{layer}"
        found += [(f"{prefix}.{n}", s, stage, True) for n, s in attention.items()]
        found += [(f"{prefix}.norm{n}", (_HIDDEN,), stage, False) for n in (0, 1)]
        width = _EXPERT_WIDTH
        if layer < _DENSE_LAYERS:
            width = _DENSE_WIDTH
        else:
            found.append((f"{prefix}.router", (_HIDDEN, _ALL_EXPERTS), stage, False))
        for name in ("gate", "up", "down"):
            shape = (width, _HIDDEN) if name == "down" else (_HIDDEN, width)
            shared = "dense" if layer < _DENSE_LAYERS else "shared"
            found.append((f"{prefix}.{shared}.{name}", shape, stage, True))
            if layer >= _DENSE_LAYERS:
                many = (_ALL_EXPERTS, *shape)
                found.append((f"{prefix}.experts.{name}", many, stage, True))
    return found
