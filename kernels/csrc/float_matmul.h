// Matrix products of float32 in any layout, for training: the second operand may hold int8 codes.
//
// Every instruction set with fused multiply-add gives the same bits, whatever the number of threads and the other rows
// and columns of the result. The order of the operations is fixed: the inputs are cut into runs of kChain; the products
// of a run are a chain of fused multiply-adds that starts from zero; the runs are added in order.

#ifndef BITNET_KERNELS_FLOAT_MATMUL_H_
#define BITNET_KERNELS_FLOAT_MATMUL_H_

#include <cstdint>

namespace bitnet {

constexpr int64_t kChain = 256;

// Element (row, i) of an operand [rows, k] is data[row * row_stride + i * step]; one of the strides is 1.
template <typename T>
struct Operand {
  const T* data;
  int64_t row_stride;
  int64_t step;

  const T* at(int64_t row, int64_t i) const { return data + row * row_stride + i * step; }
};

// One of the two is null.
struct FloatsOrCodes {
  Operand<float> floats;
  Operand<int8_t> codes;
};

// c[m, n] = a[m, k] b[n, k]^T.
struct FloatMatmul {
  int64_t m, n, k;
  Operand<float> a;
  FloatsOrCodes b;
  float* c;
};

// The loops of one instruction family (float_matmul_loops.h).
struct FloatMatmulKernels {
  int64_t rows, columns;  // of a tile, whose sums fit into registers

  // Row r of the tile, for all i < k: c[r * c_stride ..] = (add: c +) sum over i of a[r * a_row + i * a_step] times
  // b[i * columns ..].
  void (*tile)(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t k, float* c, int64_t c_stride,
               bool add);
  // Rows [row, row + count) of a, the inputs [begin, end), in tiles that are tile_stride apart: row t * rows + r goes
  // to to[t * tile_stride + (i - begin) * rows + r]. Rows missing in the last tile are zeros.
  void (*pack_rows)(const Operand<float>& a, int64_t row, int64_t count, int64_t begin, int64_t end, float* to,
                    int64_t tile_stride);
  // Likewise of b, with `columns` for `rows`.
  void (*pack_columns)(const FloatsOrCodes& b, int64_t row, int64_t count, int64_t begin, int64_t end, float* to,
                       int64_t tile_stride);
};

// Writes c, on all threads.
void float_matmul(const FloatMatmulKernels& kernels, const FloatMatmul& p);

}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_MATMUL_H_
