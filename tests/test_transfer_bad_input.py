"""Bad input to jf.TransferEngine: an error where it was made, nothing elsewhere.

Handshakes that are truncated, altered or replayed are in
tests/cpp/transfer_engine_handshake_test.cc: only an attacker makes them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from transfer_cases import POISON, Pair, engine, open_pair

import jaxfabric as jf

# Offsets in the bytes of an address or description.
VERSION_AT = 4


@pytest.fixture(params=["shm", "ofi/tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    for opened in open_pair(request.param):
        yield opened
        # Whatever was tried: nothing was written or counted, and all still works.
        a, b, peer, region = opened
        assert set(region.array) == {POISON}
        assert b.imm_counter(1).value == 0
        assert list(a.peers()) == [peer]
        assert b.stats()["peers_lost"] == 0
        source = a.register_memory(np.arange(8, dtype=np.uint8))
        a.submit_single_write(source, region.desc, 2).result()
        b.imm_counter(2).wait(1)
        np.testing.assert_array_equal(region.array[:8], source.array)


def altered(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def test_a_region_of_another_engine(pair: Pair) -> None:
    """Regions are numbered alike in all engines, and two of one process are usual."""
    a, b, _, region = pair
    a.alloc(64)
    mine, theirs = a.alloc(64), b.alloc(64)
    assert mine.key == theirs.key
    for call in (
        lambda: a.submit_single_write(theirs, region.desc, 1),
        lambda: a.submit_paged_writes(theirs, [0], region.desc, [0], 64, 1),
        lambda: a.submit_scatter(theirs, [jf.ScatterTarget(region.desc)], 1),
        lambda: a.unregister_memory(theirs),
    ):
        with pytest.raises(
            jf.FabricError, match=r"Region\(.* is not registered with this"
        ):
            call()
    a.unregister_memory(mine)
    with pytest.raises(jf.FabricError, match="or no longer"):
        a.submit_single_write(mine, region.desc, 1)


def test_what_is_no_description(pair: Pair) -> None:
    a, _, _, region = pair
    source = a.alloc(8)
    target: Any
    for target, error, match in (
        (region, TypeError, r"a Region, not an MrDesc or its bytes; pass region\.desc"),
        (None, TypeError, "a NoneType, not an MrDesc"),
        (b"x" * 40, jf.FabricError, "not the description"),
    ):
        for call in (
            lambda target=target: a.submit_single_write(source, target, 1),
            lambda target=target: a.submit_paged_writes(source, [0], target, [0], 8, 1),
            lambda target=target: a.submit_scatter(
                source, [jf.ScatterTarget(target)], 1
            ),
        ):
            with pytest.raises(error, match=match):
                call()
    source.array[:] = 7
    a.submit_single_write(source, region.desc.to_bytes(), 3, nbytes=8).result()
    pair.b.imm_counter(3).wait(1)
    assert set(region.array[:8]) == {7}
    region.array[:8] = POISON


def test_a_malformed_address(pair: Pair) -> None:
    good = pair.b.address().to_bytes()
    for bad in (b"", b"x" * 100, good[:-1], good[:40], good + b"x"):
        with pytest.raises(jf.FabricError, match="not the address of a TransferEngine"):
            pair.a.connect(bad)
    with pytest.raises(jf.FabricError, match=r"another token, or altered"):
        pair.a.connect(altered(good, len(good) - 1, good[-1] ^ 1))


def test_a_foreign_address(pair: Pair) -> None:
    other = "ofi/tcp" if pair.a.transport == "shm" else "shm"
    with engine(other) as foreign:
        with pytest.raises(jf.FabricError, match="connect to "):
            pair.a.connect(foreign.address()).result()
        assert foreign.peers() == {}


def test_a_peer_of_another_version(pair: Pair) -> None:
    address = altered(pair.b.address().to_bytes(), VERSION_AT, 9)
    with pytest.raises(jf.FabricError, match=r"version 9 .*install the same"):
        pair.a.connect(address)
    desc = altered(pair.region.desc.to_bytes(), VERSION_AT, 9)
    with pytest.raises(jf.FabricError, match=r"version 9 .*install the same"):
        jf.MrDesc.from_bytes(desc)


def test_a_peer_of_another_job_or_token(pair: Pair) -> None:
    transport = pair.b.transport
    with jf.TransferEngine(transport, job="other", token="secret") as stranger:
        with pytest.raises(jf.FabricError, match="is of job 'test'"):
            stranger.connect(pair.b.address())
    with jf.TransferEngine(transport, job="test", token="guess") as stranger:
        with pytest.raises(jf.FabricError, match="another token"):
            stranger.connect(pair.b.address())


def test_a_wrong_key(pair: Pair) -> None:
    a, _, _, region = pair
    source = a.register_memory(np.zeros(10, np.uint8))
    good = region.desc.to_bytes()
    wrong = jf.MrDesc.from_bytes(altered(good, len(good) - 1, good[-1] ^ 0x55))
    with pytest.raises(jf.FabricError, match="single write of 10 bytes"):
        a.submit_single_write(source, wrong, 1).result()


def test_an_offset_out_of_range(pair: Pair) -> None:
    a, _, _, region = pair
    source = a.register_memory(np.zeros(10, np.uint8))
    for target_offset in (region.nbytes, region.nbytes - 9, 1 << 63):
        with pytest.raises(jf.FabricError, match="outside the target region"):
            a.submit_single_write(source, region.desc, 1, target_offset=target_offset)
    with pytest.raises(jf.FabricError, match="outside the source of 10 bytes"):
        a.submit_single_write(source, region.desc, 1, source_offset=1, nbytes=10)
    with pytest.raises(jf.FabricError, match="0 bytes at offset 11 lie outside"):
        a.submit_single_write(source, region.desc, 1, source_offset=11)


def test_nothing_beyond_the_part_of_an_array_is_sent(pair: Pair) -> None:
    a, _, _, region = pair
    part = a.register_memory(np.zeros((4, 8), np.uint8)).array[1]
    desc = region.desc
    with pytest.raises(jf.FabricError, match="16 bytes at offset 0 lie outside"):
        a.submit_single_write(part, desc, 1, nbytes=16)
    with pytest.raises(jf.FabricError, match="4 bytes at offset 8 lie outside"):
        a.submit_paged_writes(part, [0, 2], desc, [0, 1], 4, 1)
    with pytest.raises(jf.FabricError, match="8 bytes at offset 1 lie outside"):
        a.submit_scatter(part, [jf.ScatterTarget(desc, 1, 0, 8)], 1)


def test_ids_are_integers_of_any_kind(pair: Pair) -> None:
    a, b, _, region = pair
    source = a.register_memory(np.full(1, POISON, np.uint8))
    number: Any = np.uint32(3)
    a.submit_single_write(source, region.desc, number).result()
    b.imm_counter(3).wait(1)
    wrong: tuple[Any, ...] = (-1, 1 << 27, 1.0, "1")
    for bad in wrong:
        with pytest.raises(ValueError, match="ids are integers"):
            a.submit_single_write(source, region.desc, bad)


@pytest.mark.parametrize("bad", ["two\nlines", "\x1b[31m"])
def test_a_name_with_control_characters(bad: str) -> None:
    with pytest.raises(jf.FabricError, match="without control characters"):
        engine(name=bad)


def test_a_description_that_claims_more_than_there_is(pair: Pair) -> None:
    a, b, _, region = pair
    source = a.register_memory(np.zeros(10, np.uint8))
    good = region.desc.to_bytes()
    length = region.nbytes.to_bytes(8, "little")
    assert good.count(length) == 1
    lie = jf.MrDesc.from_bytes(good.replace(length, (1 << 20).to_bytes(8, "little")))
    with pytest.raises(jf.FabricError, match="single write of 10 bytes"):
        a.submit_single_write(source, lie, 1, target_offset=1 << 18).result()
    assert b.stats()["counts_dropped"] == 0


def test_an_unregistered_buffer(pair: Pair) -> None:
    a, _, _, region = pair
    with pytest.raises(ValueError, match="lies in no registered memory"):
        a.submit_single_write(np.zeros(10), region.desc, 1)
    source = a.register_memory(np.zeros(10, np.uint8))
    a.unregister_memory(source)
    with pytest.raises(jf.FabricError, match="not registered"):
        a.submit_single_write(source, region.desc, 1)


def test_a_region_of_the_peers_that_is_gone(pair: Pair) -> None:
    a, b, _, _ = pair
    source = a.register_memory(np.zeros(10, np.uint8))
    gone = b.alloc(100)
    desc = gone.desc
    b.unregister_memory(gone)
    with pytest.raises(jf.FabricError, match="unregisters the target region"):
        a.submit_single_write(source, desc, 1)


def test_registration_of_freed_memory(pair: Pair) -> None:
    mapped = mmap.mmap(-1, 1 << 16)
    array = np.frombuffer(mapped, np.uint8)
    address = array.__array_interface__["data"][0]
    del array
    mapped.close()
    with pytest.raises(Exception, match="not all memory of this process"):
        pair.a._native.register_memory(address, 1 << 16, b"")
