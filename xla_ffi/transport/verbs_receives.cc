#include "transport/verbs_receives.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include "transport/verbs_credits.h"

namespace jaxfabric {

StatusOr<std::unique_ptr<VerbsReceives>> VerbsReceives::Open(VerbsPort& port,
                                                             uint64_t tag) {
  std::unique_ptr<VerbsReceives> receives(new VerbsReceives(port, tag));
  ibv_srq_init_attr attributes = {};
  attributes.attr.max_wr = port.receives_max();
  attributes.attr.max_sge = 1;
  receives->shared_ =
      VerbsOwned<ibv_srq>(port.library().create_srq(port.pd(), &attributes),
                          port.library().destroy_srq);
  if (receives->shared_ == nullptr) return port.Failed("ibv_create_srq", 0);
  return receives;
}

StatusOr<uint32_t> VerbsReceives::Reserve() {
  const uint32_t quota = ChooseQuota(port_.receives_max(), reserved_);
  if (quota == 0) {
    return Status(StatusCode::kResourceExhausted,
                  "verbs on " + port_.name() + ": all " +
                      std::to_string(port_.receives_max()) +
                      " receives are promised to peers");
  }
  while (posted_ < reserved_ + quota) JF_RETURN_IF_ERROR(Grow());
  reserved_ += quota;
  return quota;
}

Status VerbsReceives::Grow() {
  const uint64_t bytes = uint64_t{kSlab} * kVerbsFrameBytesMax;
  Slab slab = {std::make_unique<std::byte[]>(bytes), port_.NoMemory()};
  JF_ASSIGN_OR_RETURN(slab.memory, port_.Register(slab.bytes.get(), bytes,
                                                  IBV_ACCESS_LOCAL_WRITE));
  slabs_.push_back(std::move(slab));
  for (uint32_t i = 0; i < kSlab && posted_ < port_.receives_max(); ++i) {
    JF_RETURN_IF_ERROR(Repost(posted_));
    ++posted_;
  }
  return OkStatus();
}

Status VerbsReceives::Repost(uint32_t index) {
  ibv_sge piece = {};
  piece.addr = reinterpret_cast<uintptr_t>(BufferOf(index));
  piece.length = kVerbsFrameBytesMax;
  piece.lkey = slabs_[index / kSlab].memory->lkey;
  ibv_recv_wr work = {};
  work.wr_id = tag_ | index;
  work.sg_list = &piece;
  work.num_sge = 1;
  ibv_recv_wr* bad = nullptr;
  const int error = ibv_post_srq_recv(shared_.get(), &work, &bad);
  return error == 0 ? OkStatus() : port_.Failed("ibv_post_srq_recv", error);
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
