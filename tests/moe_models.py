"""The original Qwen3-MoE and Mixtral blocks, run by torch on CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

# Names as in transformers' modules, behind the prefix "mlp".
GATE, GATE_UP, DOWN = (
    "mlp.gate.weight",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
)
WEIGHTS = (GATE, GATE_UP, DOWN)
KINDS = ("qwen3_moe", "mixtral")
# Inputs whose k-th and next logits are closer than this may be routed either way.
TIE = 1e-5


def config(kind: str, hidden: int, ff: int, experts: int, k: int, **more: Any) -> Any:
    """A transformers configuration with these sizes."""
    import transformers

    more |= {"hidden_size": hidden, "num_experts_per_tok": k}
    if kind == "mixtral":
        return transformers.MixtralConfig(
            intermediate_size=ff, num_local_experts=experts, **more
        )
    return transformers.Qwen3MoeConfig(
        moe_intermediate_size=ff, num_experts=experts, norm_topk_prob=True, **more
    )


def random_case(
    seed: int, tokens: int, hidden: int, ff: int, experts: int, k: int
) -> dict[str, np.ndarray]:
    """Weights as a model starts with, scaled to give outputs of order 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, fan_in: int = 1) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)

    return {
        "x": normal(tokens, hidden),
        "dy": normal(tokens, hidden),
        "k": np.array(k),
        GATE: normal(experts, hidden, fan_in=hidden),
        GATE_UP: normal(experts, 2 * ff, hidden, fan_in=hidden),
        DOWN: normal(experts, hidden, ff, fan_in=ff),
    }


def without_ties(
    case: dict[str, np.ndarray], multiple: int
) -> tuple[dict[str, np.ndarray], int]:
    """Leaves out tokens that may be routed either way; also how many they were.

    The number of tokens left is rounded down to a multiple.
    """
    logits = case["x"].astype(np.float64) @ case[GATE].T.astype(np.float64)
    k = int(case["k"])
    ordered = np.sort(logits, axis=-1)
    clear = ordered[:, -k] - ordered[:, -k - 1] > TIE
    keep = np.flatnonzero(clear)
    keep = keep[: len(keep) // multiple * multiple]
    return case | {name: case[name][keep] for name in ("x", "dy")}, int((~clear).sum())


def torch_block(kind: str, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """y, dx and the gradients of all weights, by the original block."""
    import torch
    from transformers.models.mixtral import modeling_mixtral
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    block_type = {
        "qwen3_moe": modeling_qwen3_moe.Qwen3MoeSparseMoeBlock,
        "mixtral": modeling_mixtral.MixtralSparseMoeBlock,
    }[kind]
    experts, hidden, ff = case[DOWN].shape
    block = block_type(config(kind, hidden, ff, experts, int(case["k"])))
    weights = {name.removeprefix("mlp."): torch.tensor(case[name]) for name in WEIGHTS}
    block.load_state_dict(weights)
    block.eval()
    x: Any = torch.tensor(case["x"])[None].requires_grad_()
    y = block(x)
    y.backward(torch.tensor(case["dy"])[None])
    result = {"y": y[0], "dx": x.grad[0]}
    result |= {
        f"d{n}": block.get_parameter(n.removeprefix("mlp.")).grad for n in WEIGHTS
    }
    return {name: value.detach().numpy() for name, value in result.items()}
