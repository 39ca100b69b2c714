// XLA custom calls of attention over a cache: checks of shapes and types, bindings.

#include <algorithm>
#include <string>
#include <string_view>

#include "attention.h"
#include "attention_gradient.h"
#include "ffi_errors.h"
#include "kv_cache.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

using Queries = ffi::Buffer<ffi::F32, 4>;
using Visible = ffi::Buffer<ffi::PRED, 3>;
using Scales = ffi::Buffer<ffi::F32, 3>;
using Length = ffi::Buffer<ffi::S32, 0>;
using PerSequence = ffi::Buffer<ffi::S32, 1>;
using Angles = ffi::Buffer<ffi::F32, 3>;

bool has_shape(ffi::AnyBuffer::Dimensions dims, std::initializer_list<int64_t> expected) {
  return std::equal(dims.begin(), dims.end(), expected.begin(), expected.end());
}

// The arrays that both calls have. Fills the problem, or says what does not fit.
ffi::Error make_problem(Queries q, ffi::AnyBuffer k, ffi::AnyBuffer v, Scales k_scale, Scales v_scale, Visible visible,
                        float scale, ffi::Result<Queries> out, AttentionProblem& p) {
  const auto dims = q.dimensions();
  p.batch = dims[0], p.tokens = dims[1], p.heads = dims[2], p.head_size = dims[3];
  if (k.dimensions().size() != 4 || k.element_type() != v.element_type()) return invalid("expected k and v alike");
  p.cache_rows = k.dimensions()[0], p.room = k.dimensions()[1], p.kv_heads = k.dimensions()[2];
  switch (k.element_type()) {
    case ffi::F32: p.type = KvType::kFloat32; break;
    case ffi::BF16:
    case ffi::U16: p.type = KvType::kBfloat16; break;
    case ffi::S8: p.type = KvType::kInt8; break;
    default: return invalid("expected k and v of float32, bfloat16 (or its bits) or int8");
  }
  const int64_t scales = p.type == KvType::kInt8 ? p.room : 0;
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0 || p.head_size < 1 ||
      !has_shape(k.dimensions(), {p.cache_rows, p.room, p.kv_heads, p.head_size}) ||
      !has_shape(v.dimensions(), {p.cache_rows, p.room, p.kv_heads, p.head_size}) ||
      !has_shape(k_scale.dimensions(), {p.cache_rows, scales, p.kv_heads}) ||
      !has_shape(v_scale.dimensions(), {p.cache_rows, scales, p.kv_heads}) ||
      !has_shape(visible.dimensions(), {p.batch, p.tokens, p.room}) ||
      !has_shape(out->dimensions(), {p.batch, p.tokens, p.heads, p.head_size})) {
    return invalid("expected q[B,T,H,h], k and v[R,S,K,h], their scales[R,S,K] (int8) or [R,0,K], visible[B,T,S]");
  }
  p.scale = scale;
  p.q = q.typed_data(), p.k = k.untyped_data(), p.v = v.untyped_data();
  p.k_scale = k_scale.typed_data(), p.v_scale = v_scale.typed_data();
  p.visible = reinterpret_cast<const uint8_t*>(visible.typed_data());
  p.out = out->typed_data();
  return ffi::Error::Success();
}

ffi::Error attention_call(Queries q, ffi::AnyBuffer k, ffi::AnyBuffer v, Scales k_scale, Scales v_scale,
                          Visible visible, Length length, float scale, std::string_view isa,
                          ffi::Result<Queries> out) {
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) return unknown_isa(isa);
  AttentionProblem p{};
  ffi::Error error = make_problem(q, k, v, k_scale, v_scale, visible, scale, out, p);
  if (error.failure()) return error;
  if (p.cache_rows != p.batch) return invalid("expected k and v of B rows");
  if (out->element_count() == 0) return error;
  p.length = std::clamp<int64_t>(*length.typed_data(), 0, p.room);
  attend(kernels->floats->attention, p);
  return ffi::Error::Success();
}

ffi::Error extend_call(Queries q, Queries new_k, Queries new_v, ffi::AnyBuffer k, ffi::AnyBuffer v, Scales k_scale,
                       Scales v_scale, Visible visible, PerSequence start, PerSequence rows, Angles angles, float scale, std::string_view isa,
                       ffi::Result<Queries> out, ffi::Result<ffi::AnyBuffer> to_k, ffi::Result<ffi::AnyBuffer> to_v,
                       ffi::Result<Scales> to_k_scale, ffi::Result<Scales> to_v_scale) {
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) return unknown_isa(isa);
  AttentionProblem p{};
  ffi::Error error = make_problem(q, k, v, k_scale, v_scale, visible, scale, out, p);
  if (error.failure()) return error;
  const std::initializer_list<int64_t> tokens = {p.batch, p.tokens, p.kv_heads, p.head_size};
  const bool turned = angles.dimensions()[2] > 0;
  if (!has_shape(new_k.dimensions(), tokens) || !has_shape(new_v.dimensions(), tokens) || p.tokens > p.room ||
      !has_shape(start.dimensions(), {p.batch}) || !has_shape(rows.dimensions(), {p.batch}) ||
      p.batch > p.cache_rows ||
      !has_shape(angles.dimensions(), {p.batch, p.tokens, turned ? p.head_size : 0}) ||
      (turned && p.head_size % 2 != 0)) {
    return invalid("expected new k and v[B,T,K,h], T <= S, B <= R, positions[B], rows[B], and angles[B,T,h] or [B,T,0]");
  }
  // The results are the arguments (input_output_aliases): everything but the new tokens is there already.
  const bool same_scales = to_k_scale->untyped_data() == k_scale.untyped_data() &&
                           to_v_scale->untyped_data() == v_scale.untyped_data();
  if (to_k->untyped_data() != k.untyped_data() || to_v->untyped_data() != v.untyped_data() ||
      (p.type == KvType::kInt8 && !same_scales)) {
    return invalid("expected the cache as argument and result in the same memory");
  }
  if (out->element_count() == 0) return error;
  p.rows = rows.typed_data();
  p.angles = turned ? angles.typed_data() : nullptr;
  const NewTokens added = {new_k.typed_data(), new_v.typed_data(), start.typed_data()};
  append(p, added, {to_k->untyped_data(), to_v->untyped_data(), to_k_scale->typed_data(), to_v_scale->typed_data()});
  for (int64_t i = 0; i < p.batch; ++i) p.length = std::max(p.length, first_position(p, added, i) + p.tokens);
  attend(kernels->floats->attention, p);
  return error;
}

ffi::Error gradient_call(Queries q, Queries k, Queries v, Visible visible, Queries dout, float scale,
                         std::string_view isa, ffi::Result<Queries> dq, ffi::Result<Queries> dk,
                         ffi::Result<Queries> dv) {
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) return unknown_isa(isa);
  const auto queries = q.dimensions(), keys = k.dimensions();
  AttentionGradient p{};
  p.batch = queries[0], p.tokens = queries[1], p.heads = queries[2], p.head_size = queries[3];
  p.keys = keys[1], p.kv_heads = keys[2], p.scale = scale;
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0 || p.head_size < 1 ||
      !has_shape(keys, {p.batch, p.keys, p.kv_heads, p.head_size}) || dims(v.dimensions()) != dims(keys) ||
      !has_shape(visible.dimensions(), {p.batch, p.tokens, p.keys}) || dims(dout.dimensions()) != dims(queries) ||
      dims(dq->dimensions()) != dims(queries) || dims(dk->dimensions()) != dims(keys) ||
      dims(dv->dimensions()) != dims(keys)) {
    return invalid("expected q, dout and dq[B,T,H,h], k, v, dk and dv[B,S,K,h], visible[B,T,S]");
  }
  p.q = q.typed_data(), p.k = k.typed_data(), p.v = v.typed_data();
  p.visible = reinterpret_cast<const uint8_t*>(visible.typed_data());
  p.dout = dout.typed_data();
  p.dq = dq->typed_data(), p.dk = dk->typed_data(), p.dv = dv->typed_data();
  attention_gradient(kernels->floats->attention_gradient, kernels->floats->matmul, p);
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

BITNET_FFI_HANDLER(bitnet_kernels_extend_attention, bitnet::extend_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Queries>()     // q [B, T, H, h]
                       .Arg<bitnet::Queries>()     // new k [B, T, K, h]
                       .Arg<bitnet::Queries>()     // new v [B, T, K, h]
                       .Arg<ffi::AnyBuffer>()      // k [R, S, K, h]
                       .Arg<ffi::AnyBuffer>()      // v [R, S, K, h]
                       .Arg<bitnet::Scales>()      // of k [R, S, K], [R, 0, K] if it has none
                       .Arg<bitnet::Scales>()      // of v
                       .Arg<bitnet::Visible>()     // [B, T, S]
                       .Arg<bitnet::PerSequence>()  // positions of the first new tokens [B]
                       .Arg<bitnet::PerSequence>()  // rows of the cache [B]
                       .Arg<bitnet::Angles>()      // cosines and sines [B, T, h], or [B, T, 0]
                       .Attr<float>("scale")
                       .Attr<std::string_view>("isa")
                       .Ret<bitnet::Queries>()     // [B, T, H, h]
                       .Ret<ffi::AnyBuffer>()      // k, v and their scales with the new tokens, in place
                       .Ret<ffi::AnyBuffer>()
                       .Ret<bitnet::Scales>()
                       .Ret<bitnet::Scales>());

BITNET_FFI_HANDLER(bitnet_kernels_attention_gradient, bitnet::gradient_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Queries>()  // q [B, T, H, h]
                       .Arg<bitnet::Queries>()  // k [B, S, K, h]
                       .Arg<bitnet::Queries>()  // v [B, S, K, h]
                       .Arg<bitnet::Visible>()  // [B, T, S]
                       .Arg<bitnet::Queries>()  // dout, as q
                       .Attr<float>("scale")
                       .Attr<std::string_view>("isa")
                       .Ret<bitnet::Queries>()    // dq
                       .Ret<bitnet::Queries>()    // dk
                       .Ret<bitnet::Queries>());  // dv
