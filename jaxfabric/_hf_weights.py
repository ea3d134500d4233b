"""Reads the expert weights of transformers checkpoints, slice by slice.

transformers stores matrices as [out, in]; the layer's are [in, out]. On disk there is
one tensor per expert and matrix (names as on the model hub) or one for all experts.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_Path = str | PathLike[str]
Source = _Path | Sequence[_Path] | Mapping[str, Any]
_Index = tuple[slice, ...]

# Parameter of the layer -> its name in one expert: Qwen3-MoE's, Mixtral's.
_PER_EXPERT = {
    "w_gate": ("gate_proj", "w1"),
    "w_up": ("up_proj", "w3"),
    "w_down": ("down_proj", "w2"),
}
_PLAIN = {
    "gate": "gate.weight",
    "shared_gate": "shared_experts.gate_proj.weight",
    "shared_up": "shared_experts.up_proj.weight",
    "shared_down": "shared_experts.down_proj.weight",
}


def _files(source: _Path | Sequence[_Path]) -> list[Path]:
    if not isinstance(source, (str, PathLike)):
        return [Path(file) for file in source]
    path = Path(source)
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return [path / "model.safetensors"]
    shards = json.loads(index.read_text())["weight_map"].values()
    return [path / shard for shard in sorted(set(shards))]


class Checkpoint:
    """Tensors by name, of one layer; a context manager that closes the files.

    ``read`` gives sharded arrays, for which it reads the slices of this process only.
    """

    def __init__(self, source: Source, prefix: str) -> None:
        self._prefix = prefix
        self._open = contextlib.ExitStack()
        self._slices: dict[str, Callable[[], Any]] = {}
        if isinstance(source, Mapping):
            for name, value in source.items():
                self._slices[name] = functools.partial(np.asarray, value)
            return
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError(
                "jf.nnx.MoE.load_hf reads safetensors files; pip install safetensors"
            ) from error
        for path in _files(source):
            file = self._open.enter_context(safe_open(path, framework="np"))
            for name in file.keys():
                self._slices[name] = functools.partial(file.get_slice, name)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def _get(self, name: str, shape: tuple[int, ...]) -> Any:
        """A lazily sliced tensor; ``shape`` is what it must have."""
        full = f"{self._prefix}.{name}"
        if full not in self._slices:
            raise KeyError(
                f"jf.nnx.MoE.load_hf: no tensor {full!r} among the "
                f"{len(self._slices)} of the checkpoint; check prefix="
            )
        tensor = self._slices[full]()
        found = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape
        if tuple(found) != shape:
            raise ValueError(
                f"jf.nnx.MoE.load_hf: {full!r} has shape {tuple(found)}, but the layer "
                f"needs {shape}; check its d_model, d_ff and num_experts"
            )
        return tensor

    def read(
        self,
        param: str,
        shape: tuple[int, ...],
        dtype: Any,
        sharding: jax.sharding.Sharding,
    ) -> jax.Array:
        """The layer's parameter of this name, with shape, dtype and sharding."""
        load = self._loader(param, shape)

        def shard(index: _Index | None) -> np.ndarray:
            index = (slice(None),) * len(shape) if index is None else index
            return np.ascontiguousarray(load(index)).astype(jnp.dtype(dtype))

        return jax.make_array_from_callback(shape, sharding, shard)

    def _loader(
        self, param: str, shape: tuple[int, ...]
    ) -> Callable[[_Index], np.ndarray]:
        """A function from an index into the parameter to its values."""
        if param in _PLAIN:
            tensor = self._get(_PLAIN[param], shape[::-1])
            return lambda index: np.asarray(tensor[index[::-1]]).T
        if f"{self._prefix}.experts.down_proj" in self._slices:
            return self._fused(param, shape)
        experts, rows, columns = shape
        name, mixtral = _PER_EXPERT[param]
        if f"{self._prefix}.experts.0.{mixtral}.weight" in self._slices:
            name = mixtral

        def one_by_one(index: _Index) -> np.ndarray:
            parts = []
            for expert in range(*index[0].indices(experts)):
                tensor = self._get(f"experts.{expert}.{name}.weight", (columns, rows))
                parts.append(np.asarray(tensor[index[:0:-1]]).T)
            return np.stack(parts)

        return one_by_one

    def _fused(
        self, param: str, shape: tuple[int, ...]
    ) -> Callable[[_Index], np.ndarray]:
        experts, rows, columns = shape
        if param == "w_down":
            tensor = self._get("experts.down_proj", (experts, columns, rows))
            return lambda index: np.asarray(
                tensor[index[0], index[2], index[1]]
            ).swapaxes(1, 2)
        tensor = self._get("experts.gate_up_proj", (experts, 2 * columns, rows))
        first = 0 if param == "w_gate" else columns

        def half(index: _Index) -> np.ndarray:
            start, stop, _ = index[2].indices(columns)
            picked = tensor[index[0], slice(first + start, first + stop), index[1]]
            return np.asarray(picked).swapaxes(1, 2)

        return half
