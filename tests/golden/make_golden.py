"""Writes the golden files beside it: `python tests/golden/make_golden.py`.

Each holds a block's inputs and weights, and its output and gradients as computed by
torch and transformers on CPU, in float32. The trained ones come from byte-level models
trained for a minute on pydoc_data.topics, so that their routers are as uneven as real
ones; the inputs are the activations in front of the second layer's block.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import moe_models  # noqa: E402

HIDDEN, FF, EXPERTS, K, TOKENS, LAYER = 32, 16, 8, 2, 64, 1


def train(kind: str, steps: int = 250, batch: int = 8, length: int = 64) -> Any:
    """A tiny causal language model and the last batch of its text."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(1)  # for the same bits on every machine, and it is small
    config = moe_models.config(
        *(kind, HIDDEN, FF, EXPERTS, K),
        vocab_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=length,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    data = torch.tensor(np.frombuffer(text, np.uint8).astype(np.int64))
    for step in range(steps):
        starts = torch.randint(len(data) - length, (batch,))
        ids = torch.stack([data[s : s + length] for s in starts])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"{kind}: step {step}, loss {loss.item():.3f}")
    return model, ids


def trained_case(kind: str) -> dict[str, np.ndarray]:
    """Weights of one block of a trained model, and real activations in front of it."""
    import torch

    model, ids = train(kind)
    block = model.model.layers[LAYER].mlp
    seen = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    x = seen[0].reshape(-1, HIDDEN)[:TOKENS].numpy()
    dy = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    weights = {
        name: block.get_parameter(name.removeprefix("mlp.")).detach().numpy()
        for name in moe_models.WEIGHTS
    }
    return {"x": x, "dy": dy, "k": np.array(K)} | weights


def main() -> None:
    """Writes all files."""
    for kind in moe_models.KINDS:
        random = moe_models.random_case(0, TOKENS, HIDDEN, FF, EXPERTS, K)
        for name, case in (("random", random), ("trained", trained_case(kind))):
            case, _ = moe_models.without_ties(case, multiple=8)
            path = HERE / f"{kind}_{name}.npz"
            arrays: dict[str, Any] = case | moe_models.torch_block(kind, case)
            np.savez_compressed(path, **arrays)
            print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
