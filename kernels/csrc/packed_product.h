// The product of rows of codes with packed matrices, split over threads.

#ifndef BITNET_KERNELS_PACKED_PRODUCT_H_
#define BITNET_KERNELS_PACKED_PRODUCT_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "divide.h"
#include "integer_matmul.h"

namespace bitnet {

// The rows of x with every group padded to the blocks of one matrix, and their sums.
struct Rows {
  std::vector<int8_t> padded;
  std::vector<uint32_t> signs;
  std::vector<int32_t> sums;

  // From codes [m, k], whose rows lie stride apart. p.x and p.x_sums point to them afterwards, or to a padded copy.
  void prepare(const int8_t* codes, int64_t k, int64_t stride, const MatmulKernels& kernels, Problem& p);
};

// Multiplies the rows of x in `part`, which begin at `row`, with the panels [begin, end) of a matrix.
using Work = std::function<void(size_t matrix, const Problem& part, int64_t row, int64_t begin, int64_t end)>;

// Runs work over the panels of all matrices, in one parallel loop where there is enough work for one. Without table_rows
// an item has all rows of x.
void run(const std::vector<Problem>& problems, TableRows table_rows, const Work& work);

}  // namespace bitnet

#endif  // BITNET_KERNELS_PACKED_PRODUCT_H_
