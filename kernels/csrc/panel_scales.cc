#include "panel_scales.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "integer_matmul.h"

namespace bitnet {
namespace {

// 16 bytes of numbers, which every processor of 64 bits has vectors for.
template <typename T>
struct Vector;
template <>
struct Vector<uint16_t> {
  typedef uint16_t Type __attribute__((vector_size(16)));
};
template <>
struct Vector<uint32_t> {
  typedef uint32_t Type __attribute__((vector_size(16)));
};

// The elements of a and b in turn: of their low halves, or of their high halves.
#if defined(__clang__)
inline Vector<uint16_t>::Type low(Vector<uint16_t>::Type a, Vector<uint16_t>::Type b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Vector<uint16_t>::Type high(Vector<uint16_t>::Type a, Vector<uint16_t>::Type b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline Vector<uint32_t>::Type low(Vector<uint32_t>::Type a, Vector<uint32_t>::Type b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
inline Vector<uint32_t>::Type high(Vector<uint32_t>::Type a, Vector<uint32_t>::Type b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
#else
inline Vector<uint16_t>::Type low(Vector<uint16_t>::Type a, Vector<uint16_t>::Type b) {
  return __builtin_shuffle(a, b, Vector<uint16_t>::Type{0, 8, 1, 9, 2, 10, 3, 11});
}
inline Vector<uint16_t>::Type high(Vector<uint16_t>::Type a, Vector<uint16_t>::Type b) {
  return __builtin_shuffle(a, b, Vector<uint16_t>::Type{4, 12, 5, 13, 6, 14, 7, 15});
}
inline Vector<uint32_t>::Type low(Vector<uint32_t>::Type a, Vector<uint32_t>::Type b) {
  return __builtin_shuffle(a, b, Vector<uint32_t>::Type{0, 4, 1, 5});
}
inline Vector<uint32_t>::Type high(Vector<uint32_t>::Type a, Vector<uint32_t>::Type b) {
  return __builtin_shuffle(a, b, Vector<uint32_t>::Type{2, 6, 3, 7});
}
#endif

// to[i][r] = from[r][i] for as many rows and columns as a vector has elements; from and to are strided by rows.
template <typename T>
void transpose(const T* from, int64_t from_stride, T* to) {
  constexpr int kSize = 16 / sizeof(T);
  typename Vector<T>::Type rows[kSize], mixed[kSize];
  for (int i = 0; i < kSize; ++i) std::memcpy(&rows[i], from + i * from_stride, 16);
  for (int left = kSize; left > 1; left /= 2) {
    for (int i = 0; i < kSize / 2; ++i) {
      mixed[2 * i] = low(rows[i], rows[i + kSize / 2]);
      mixed[2 * i + 1] = high(rows[i], rows[i + kSize / 2]);
    }
    std::memcpy(rows, mixed, sizeof(rows));
  }
  for (int i = 0; i < kSize; ++i) std::memcpy(to + i * kPanelRows, &rows[i], 16);
}

// T: uint16_t for float16, uint32_t for float32.
template <typename T>
void transpose_panel(const ScaleMatrix& s, int64_t groups, int64_t first, int64_t rows, float* to) {
  constexpr int64_t kSize = 16 / sizeof(T);
  const T* from = static_cast<const T*>(s.data) + first * s.stride;
  alignas(64) T block[kSize * kPanelRows];  // [groups][rows]
  for (int64_t g = 0; g < groups; g += kSize) {
    // The last block begins earlier: what it writes a second time is the same.
    const int64_t begin = std::max<int64_t>(0, std::min(g, groups - kSize)), count = std::min(kSize, groups);
    if (rows == kPanelRows && groups >= kSize && s.stride > 0) {
      for (int64_t r = 0; r < kPanelRows; r += kSize) transpose(from + r * s.stride + begin, s.stride, block + r);
    } else {
      std::memset(block, 0, sizeof(block));
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < count; ++i) block[i * kPanelRows + r] = from[r * s.stride + begin + i];
      }
    }
    if constexpr (std::is_same_v<T, uint16_t>) {
      s.widen(block, count * kPanelRows, to + begin * kPanelRows);
    } else {
      std::memcpy(to + begin * kPanelRows, block, count * kPanelRows * sizeof(float));
    }
  }
}

}  // namespace

void panel_scales(const ScaleMatrix& scales, int64_t groups, int64_t first, int64_t rows, float* to) {
  if (scales.stride == 0 && !scales.half && rows == kPanelRows) {
    std::fill_n(to, groups * kPanelRows, *static_cast<const float*>(scales.data));
    return;
  }
  scales.half ? transpose_panel<uint16_t>(scales, groups, first, rows, to)
              : transpose_panel<uint32_t>(scales, groups, first, rows, to);
}

}  // namespace bitnet
