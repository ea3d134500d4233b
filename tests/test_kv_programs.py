"""jf.kv.send_layer inside jitted programs, and the page about jf.kv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kv_cases import connected, layout, sides, taken
from ranks import run_child
from test_docs import blocks
from transfer_cases import until

import jaxfabric as jf
from jaxfabric.kv import _send_layer

ROOT = Path(__file__).resolve().parent.parent


def prefill(sender: jf.kv.PageSender, send: Any = jf.kv.send_layer) -> Any:
    """A program that sends x + layer as each layer's pages."""

    @jax.jit
    def run(x: jax.Array, request: jax.Array, rows: jax.Array, pages: jax.Array) -> Any:
        tok = jf.token()
        for layer in range(3):
            tok = send(
                *(sender, request, layer, x + layer, rows), pool_pages=pages, token=tok
            )
        return tok

    return run


def send_through_host(
    sender: jf.kv.PageSender, request: Any, layer: int, kv: Any, pages: Any, **rest: Any
) -> Any:
    """What GPUs do, on the CPU."""
    operands = (kv, pages, rest["pool_pages"], request, rest["token"])
    return _send_layer._through_host(*operands, pool=sender.programs().id, layer=layer)


@pytest.mark.parametrize("send", [jf.kv.send_layer, send_through_host])
@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_a_program_sends_layers_of_many_requests(transport: str, send: Any) -> None:
    with sides(transport, [layout()], [layout()]) as ((tx,), (rx,)):
        peer, run = connected(tx, rx), prefill(tx, send)
        x = jnp.arange(5 * 2 * 4 * 4 * 8, dtype=jnp.float32).reshape(5, 2, 4, 4, 8)
        for i in range(6):
            request_id = (i << 61) + i
            rows = [4, i % 4, -1]
            pages = [2 * i + 1, 2 * i, 0]
            request = rx.expect(request_id, 7)
            sending = tx.begin(request_id, peer, pages=pages[:2], num_tokens=7)
            jax.block_until_ready(
                run(
                    x,
                    jf.kv.request_operand(request_id),
                    jnp.asarray(rows, jnp.int32),
                    jnp.asarray(pages, jnp.int32),
                )
            )
            sending.send_tail(b"%d" % i)
            request.result()
            sending.result()
            tokens = x[jnp.array(rows[:2])].transpose(0, 2, 1, 3, 4).reshape(8, 2, 4, 8)
            got = taken(rx.pool, rx.layout, request.pages, 7)
            for layer in range(3):
                np.testing.assert_array_equal(got[layer], tokens[:7] + layer)
            request.release()


def test_layers_are_on_their_way_before_the_program_ends() -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        request = rx.expect(1, 4)
        sending = tx.begin(1, peer, pages=[3], num_tokens=4)
        (leg,) = sending._legs
        seen = []

        def wait_for_first(x: np.ndarray) -> np.ndarray:
            until(lambda: len(leg.done) == 1)
            seen.append(rx.pool[0, request.pages[0]].copy())
            return x

        @jax.jit
        def run(x: jax.Array) -> Any:
            page = jnp.array([3], jnp.int32)
            tok = jf.kv.send_layer(
                tx, 1, 0, x, jnp.array([0], jnp.int32), pool_pages=page
            )
            like = jax.ShapeDtypeStruct(x.shape, x.dtype)
            # The rest of the program needs what has left it already.
            return jax.pure_callback(wait_for_first, like, x + tok[0]), tok

        x = jnp.full((1, 2, 4, 4, 8), 5.0)
        jax.block_until_ready(run(x))
        assert (seen[0] == 5).all()


def test_a_callback_of_an_outcome_may_send_a_tail() -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        sent = [tx.begin(i, peer, pages=[i], num_tokens=4) for i in range(2)]
        for layer in range(3):
            sent[1].send(layer)
        sent[0].add_done_callback(lambda _: sent[1].send_tail(b"late"))
        request = rx.expect(1, 4)
        x, at = jnp.zeros((1, 2, 4, 4, 8)), jnp.zeros(1, jnp.int32)
        for _ in range(2):  # the second one fails the request
            jax.block_until_ready(jf.kv.send_layer(tx, 0, 0, x, at))
        request.result(10)
        assert request.tail == b"late"


def test_a_program_that_sends_what_is_not_expected_fails_the_request() -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        request = rx.expect(1, 4)
        sending = tx.begin(1, peer, pages=[3], num_tokens=4)
        x, at = jnp.zeros((1, 2, 4, 4, 8)), jnp.zeros(1, jnp.int32)
        for _ in range(2):
            jax.block_until_ready(jf.kv.send_layer(tx, 1, 0, x, at))
        for outcome in (request, sending):
            with pytest.raises(jf.FabricError, match="layer 0, tokens 0 to 4"):
                outcome.result()
        with pytest.raises(ValueError, match="row 0 of 1 to page 24 of 24: out of"):
            jax.block_until_ready(jf.kv.send_layer(tx, 1, 0, x, at, pool_pages=at + 24))
        number = tx.programs().id
        tx.close()
        with pytest.raises(jf.FabricError, match="the PageSender is closed"):
            jf.kv.send_layer(tx, 1, 0, x, at)
        from jaxfabric.kv._send_layer import send_layer_p

        operands = (x, at, at, jnp.zeros(2, jnp.uint32), jf.token())
        with pytest.raises(ValueError, match="there is no pool"):
            jax.block_until_ready(send_layer_p.bind(*operands, pool=number, layer=0))


def test_bad_pages_are_refused_by_the_host_too() -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), _):
        x, at = jnp.zeros((5, 2, 4, 4, 8)), jnp.zeros(3, jnp.int32)
        number = tx.programs().id
        for pages, match in ((at + 24, "the pool has 24"), (at, "there is no pool")):
            with pytest.raises(Exception, match=match):
                jax.block_until_ready(
                    _send_layer._through_host(
                        *(x, at, pages, jnp.zeros(2, jnp.uint32), jf.token()),
                        pool=number,
                        layer=0,
                    )
                )
            tx.close()


def test_bad_operands_are_refused() -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), _):
        x, at = jnp.zeros((1, 2, 4, 4, 8)), jnp.zeros(1, jnp.int32)
        send = jf.kv.send_layer
        with pytest.raises(TypeError, match="not a PageSender"):
            send(None, 1, 0, x, at)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"kv is float32\[1, 2, 4, 8, 8\]"):
            send(tx, 1, 0, jnp.zeros((1, 2, 4, 8, 8)), at)
        with pytest.raises(TypeError, match="pack elements of int4, 2 to a byte"):
            send(tx, 1, 0, x.astype(jnp.int4), at)
        with pytest.raises(TypeError, match="kv is int32"):
            send(tx, 1, 0, x.astype(jnp.int32), at)
        with pytest.raises(TypeError, match=r"pages must be int32\[1\]"):
            send(tx, 1, 0, x, at.astype(jnp.float32))
        with pytest.raises(TypeError, match=r"pool_pages must be int32\[1\]"):
            send(tx, 1, 0, x, at, pool_pages=jnp.zeros(2, jnp.int32))
        with pytest.raises(ValueError, match="layer=3 is not in 0 to 2"):
            send(tx, 1, 3, x, at)
        with pytest.raises(TypeError, match=r"request must be uint32\[2\]"):
            send(tx, at, 0, x, at)
        with pytest.raises(ValueError, match="request_id=-1"):
            jf.kv.request_operand(-1)
        with pytest.raises(NotImplementedError, match="no derivative"):
            jax.grad(lambda x: send(tx, 1, 0, x, at)[0])(x)
    pages_last = ("layers", "caches", "pages", "page_tokens", "heads", "head_size")
    with sides("shm", [layout(order=pages_last)], [layout()]) as ((tx,), _):
        kv = jnp.zeros((1, *tx.layout.shape[2:]))
        with pytest.raises(ValueError, match="order begins with 'layers', 'pages'"):
            jf.kv.send_layer(tx, 1, 0, kv, at)


def test_the_page_about_kv_is_one_program(tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    parts = blocks(ROOT / "docs/kv.md")
    assert len(parts) >= 5
    program.write_text("\n".join(parts))
    printed = run_child(str(program))
    assert "tail b'last hidden state, sampling state'" in printed
    assert "dtype is 'float32' at the sender and 'bfloat16' at the receiver" in printed
    assert "cancelled by the sender" in printed
    assert "'free': 256" in printed
