// XLA custom call of attention over a cache: checks of shapes and types, bindings.

#include <algorithm>
#include <string>
#include <string_view>

#include "attention.h"
#include "ffi_errors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

using Queries = ffi::Buffer<ffi::F32, 4>;
using Visible = ffi::Buffer<ffi::PRED, 3>;
using Scales = ffi::Buffer<ffi::F32, 3>;
using Length = ffi::Buffer<ffi::S32, 0>;

bool has_shape(ffi::AnyBuffer::Dimensions dims, std::initializer_list<int64_t> expected) {
  return std::equal(dims.begin(), dims.end(), expected.begin(), expected.end());
}

ffi::Error attention_call(Queries q, ffi::AnyBuffer k, ffi::AnyBuffer v, Scales k_scale, Scales v_scale,
                          Visible visible, Length length, float scale, std::string_view isa,
                          ffi::Result<Queries> out) {
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) return unknown_isa(isa);
  AttentionProblem p{};
  const auto dims = q.dimensions();
  p.batch = dims[0], p.tokens = dims[1], p.heads = dims[2], p.head_size = dims[3];
  if (k.dimensions().size() != 4 || k.element_type() != v.element_type()) return invalid("expected k and v alike");
  p.room = k.dimensions()[1], p.kv_heads = k.dimensions()[2];
  switch (k.element_type()) {
    case ffi::F32: p.type = KvType::kFloat32; break;
    case ffi::BF16:
    case ffi::U16: p.type = KvType::kBfloat16; break;
    case ffi::S8: p.type = KvType::kInt8; break;
    default: return invalid("expected k and v of float32, bfloat16 (or its bits) or int8");
  }
  const int64_t scales = p.type == KvType::kInt8 ? p.room : 0;
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0 || p.head_size < 1 ||
      !has_shape(k.dimensions(), {p.batch, p.room, p.kv_heads, p.head_size}) ||
      !has_shape(v.dimensions(), {p.batch, p.room, p.kv_heads, p.head_size}) ||
      !has_shape(k_scale.dimensions(), {p.batch, scales, p.kv_heads}) ||
      !has_shape(v_scale.dimensions(), {p.batch, scales, p.kv_heads}) ||
      !has_shape(visible.dimensions(), {p.batch, p.tokens, p.room}) ||
      !has_shape(out->dimensions(), {p.batch, p.tokens, p.heads, p.head_size})) {
    return invalid("expected q[B,T,H,h], k and v[B,S,K,h], their scales[B,S,K] (int8) or [B,0,K], visible[B,T,S]");
  }
  if (out->element_count() == 0) return ffi::Error::Success();
  p.length = std::clamp<int64_t>(*length.typed_data(), 0, p.room);
  p.scale = scale;
  p.q = q.typed_data(), p.k = k.untyped_data(), p.v = v.untyped_data();
  p.k_scale = k_scale.typed_data(), p.v_scale = v_scale.typed_data();
  p.visible = reinterpret_cast<const uint8_t*>(visible.typed_data());
  p.out = out->typed_data();
  attend(kernels->floats->attention, p);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

BITNET_FFI_HANDLER(bitnet_kernels_attention, bitnet::attention_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Queries>()  // q [B, T, H, h]
                       .Arg<ffi::AnyBuffer>()   // k [B, S, K, h]
                       .Arg<ffi::AnyBuffer>()   // v [B, S, K, h]
                       .Arg<bitnet::Scales>()   // of k [B, S, K], [B, 0, K] if it has none
                       .Arg<bitnet::Scales>()   // of v
                       .Arg<bitnet::Visible>()  // [B, T, S]
                       .Arg<bitnet::Length>()   // positions written
                       .Attr<float>("scale")
                       .Attr<std::string_view>("isa")
                       .Ret<bitnet::Queries>());  // [B, T, H, h]
