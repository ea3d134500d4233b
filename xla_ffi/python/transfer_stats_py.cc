#include "python/transfer_stats_py.h"

#include <nanobind/stl/string.h>

namespace nb = nanobind;

namespace jaxfabric {
namespace {

nb::dict PeerRow(const TransferPeerStats& stats) {
  nb::dict row;
  row["name"] = stats.name;
  row["connected"] = stats.connected;
  row["transfers_sent"] = stats.transfers_sent;
  row["transfer_bytes_sent"] = stats.transfer_bytes_sent;
  row["transfers_failed"] = stats.transfers_failed;
  row["transfers_received"] = stats.transfers_received;
  row["counts_dropped"] = stats.counts_dropped;
  row["messages_sent"] = stats.messages_sent;
  row["messages_received"] = stats.messages_received;
  return row;
}

}  // namespace

nb::dict ToPython(const TransferEngineStats& stats) {
  nb::dict row;
  row["operations"] = stats.operations;
  row["operations_failed"] = stats.operations_failed;
  row["handshakes"] = stats.handshakes;
  row["refused_seal"] = stats.refused_seal;
  row["refused_version"] = stats.refused_version;
  row["refused_replay"] = stats.refused_replay;
  row["refused_other"] = stats.refused_other;
  row["last_refusal"] = stats.last_refusal;
  row["strangers_dropped"] = stats.strangers_dropped;
  row["counts_dropped"] = stats.counts_dropped;
  row["messages_arrived"] = stats.messages_arrived;
  row["messages_handled"] = stats.messages_handled;
  row["messages_dropped"] = stats.messages_dropped;
  row["peers_lost"] = stats.peers_lost;
  nb::list nics;
  for (const DomainStats& nic : stats.nics) {
    nb::dict of_nic;
    of_nic["writes"] = nic.writes;
    of_nic["write_bytes"] = nic.write_bytes;
    of_nic["messages"] = nic.messages;
    of_nic["errors"] = nic.errors;
    of_nic["writes_again"] = nic.writes_again;
    of_nic["links_failed"] = nic.links_failed;
    of_nic["open_writes"] = nic.open_writes;
    of_nic["malformed_dropped"] = nic.malformed_dropped;
    of_nic["refused_frames"] = nic.refused_frames;
    nics.append(of_nic);
  }
  row["nics"] = nics;
  nb::dict peers;
  for (const auto& [peer, of_peer] : stats.peers) {
    peers[nb::int_(peer)] = PeerRow(of_peer);
  }
  row["peers"] = peers;
  return row;
}

}  // namespace jaxfabric
