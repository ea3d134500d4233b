"""Routers against their definitions; test_moe_parity.py checks the models' own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfabric.moe.routers import Router, mixtral, qwen3_moe

LOGITS = jnp.log(jnp.array([[1.0, 3.0, 6.0], [5.0, 1.0, 4.0]], jnp.float32))


def test_by_hand() -> None:
    ids, weights = mixtral(LOGITS, 2)
    np.testing.assert_array_equal(ids, [[2, 1], [0, 2]])
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [5 / 9, 4 / 9]], rtol=1e-6)
    same, normalised = qwen3_moe(LOGITS, 2)
    np.testing.assert_array_equal(ids, same)
    np.testing.assert_allclose(weights, normalised, rtol=1e-6)
    _, plain = qwen3_moe(LOGITS, 2, norm_topk_prob=False)
    np.testing.assert_allclose(plain, [[0.6, 0.3], [0.5, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("router", [mixtral, qwen3_moe])
def test_float32_whatever_comes(router: Router) -> None:
    logits = jax.random.normal(jax.random.key(0), (4, 5, 16)).astype(jnp.bfloat16)
    ids, weights = router(logits, 4)
    assert ids.shape == weights.shape == (4, 5, 4)
    assert ids.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    exact = np.sort(np.asarray(logits, np.float32))[..., :-5:-1]
    np.testing.assert_array_equal(jnp.take_along_axis(logits, ids, -1), exact)


@pytest.mark.parametrize("router", [mixtral, qwen3_moe])
@pytest.mark.parametrize("k", [0, 4])
def test_too_many_experts(router: Router, k: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts_per_tok={k} .* 3 experts"):
        router(LOGITS, k)
