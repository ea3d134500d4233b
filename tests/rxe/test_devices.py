"""The devices of a guest, by rdma-core's own program: is the bench sound?"""

from __future__ import annotations

from rxe import devices
from rxe.devices import Cable

MESSAGES = 300  # with 1600 packets, of which 8 are lost in the mean


def test_a_cable_loses_what_it_should(cable: Cable) -> None:
    ends = [[device] for device in cable.devices]
    devices.ping(ends, "127.0.0.1", 10)
    assert devices.packets_lost(cable.interfaces[0]) == 0
    devices.disturb(cable.interfaces[0], *devices.LOSS)
    devices.ping(ends, "127.0.0.1", MESSAGES)
    assert devices.packets_lost(cable.interfaces[0]) > 0


def test_queue_pairs_are_counted_while_they_are_open(rails: list[str]) -> None:
    assert devices.queue_pairs(rails[0]) == []
    server = [devices.PING, "-d", rails[0], "-g", str(devices.gid_index(rails[0]))]
    with devices.running(server) as process:
        devices.wait_until(lambda: len(devices.queue_pairs(rails[0])) == 1)
        assert devices.queue_pairs(rails[0])[0]["pid"] == process.pid
    assert devices.queue_pairs(rails[0]) == []
