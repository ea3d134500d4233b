"""What a plan would take on a cluster: a model, from measured or published rates."""

from __future__ import annotations

from typing import NamedTuple

from jaxfabric.weights._buckets import bucket_size
from jaxfabric.weights._plan import Plan


class Rates(NamedTuple):
    """What the estimate is made from.

    Attributes:
      link: bytes/s of each rank's NICs together, in each direction.
      write_s: seconds that the engine takes for a write.
      device_to_host: bytes/s of copies from devices.
      memory: bytes/s of copies in host memory, read and write counted once.
      quantise: bytes/s of e4m3 that a rank makes, with all threads that pack.
    """

    link: float = 50e9  # 400 Gbit/s
    write_s: float = 2e-6
    device_to_host: float = 50e9
    memory: float = 20e9
    quantise: float = 6e9  # four threads, each as fast as a core was measured


class Estimate(NamedTuple):
    """The time of one push, by stage, and its bytes and writes.

    Stages overlap bucket by bucket, so that a push takes about as long as its longest
    one, `total_s`.

    Attributes:
      sent, received: bytes of the busiest rank on either side.
      nbytes: of all ranks together.
      quantised: bytes of e4m3 that the busiest rank makes; for each receiver anew.
      writes: of the busiest source rank.
      copy_s: its copies from devices: its part of the tree.
      quantise_s: it quantises, which is a part of packing.
      pack_s: it packs what it sends, quantises, and computes checksums.
      link_s: the busiest link of either side, and the writes' own cost.
      unpack_s: the busiest target rank checks and unpacks what it receives.
    """

    sent: int
    received: int
    nbytes: int
    quantised: int
    writes: int
    copy_s: float
    quantise_s: float
    pack_s: float
    link_s: float
    unpack_s: float

    @property
    def total_s(self) -> float:
        """The longest stage."""
        return max(self.copy_s, self.pack_s, self.link_s, self.unpack_s)


def estimate(plan: Plan, rates: Rates | None = None) -> Estimate:
    """What a push takes, if ranks have nothing else to do.

    It is a model of links and memory, not of a network's congestion: what it says of
    a cluster was not measured there.

    Args:
      plan: the real one: its bytes and writes are counted, not guessed.
      rates: of the machines; ``None`` takes those of `Rates`.

    Example::

      print(jf.weights.estimate(plan).total_s)
    """
    rates = rates or Rates()
    sent = dict.fromkeys(plan.source.ranks, 0)
    received = dict.fromkeys(plan.target.ranks, 0)
    writes = dict.fromkeys(plan.source.ranks, 0)
    for (source, target), nbytes in plan.loads().items():
        sent[source] += nbytes
        received[target] += nbytes
        size = bucket_size(nbytes, plan.bucket_bytes, len(plan.source.ranks))
        writes[source] += -(-nbytes // size)
    quantised = dict.fromkeys(plan.source.ranks, 0)
    for (source, _), nbytes in plan.loads(quantised=True).items():
        quantised[source] += nbytes
    most_sent, most_received = max(sent.values()), max(received.values())
    most_quantised = max(quantised.values())
    most_writes = max(writes.values())
    held = plan.source.nbytes / len(plan.source.ranks)
    link_s = max(most_sent, most_received) / rates.link
    return Estimate(
        most_sent,
        most_received,
        sum(sent.values()),
        most_quantised,
        most_writes,
        copy_s=held / rates.device_to_host,
        quantise_s=most_quantised / rates.quantise,
        pack_s=max(
            2 * sent[rank] / rates.memory + quantised[rank] / rates.quantise
            for rank in sent
        ),
        link_s=link_s + most_writes * rates.write_s,
        unpack_s=2 * most_received / rates.memory,
    )
