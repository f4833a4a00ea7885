// Tables that are made once: where a value's code lies, of a format's levels and of the 8-bit dynamic map.
#pragma once
#include "kernels.h"
#include "types.h"

namespace qlora {

// The cells of 16 ascending levels. False where two midpoints share a cell: such a format has no kernel here.
bool fill_cells(const float* levels, Cells& cells);

// The nearest of the 256 values of a dynamic map. Sign, exponent and seven bits of the mantissa of x name a cell that
// holds one midpoint at most, so code = code of the cell + (x > its threshold). Cells below 2^-22, where one midpoint
// lies at most, are one.
struct DynamicCells {
  static constexpr int kShift = 16, kFirst = (127 - 22) << (23 - kShift), kCount = (22 << (23 - kShift)) + 1;
  float threshold[2][kCount];
  uint8_t code[2][kCount];

  static int cell(float x) {
    const int key = int((bits_of(x) & 0x7fffffff) >> kShift) - kFirst;
    return key < 0 ? 0 : key < kCount ? key : kCount - 1;
  }
  void fill(const float* midpoints) {
    for (int negative = 0; negative < 2; ++negative)
      for (int k = 0; k < kCount; ++k) threshold[negative][k] = __builtin_inff(), code[negative][k] = 0;
    for (int i = 0; i < 255; ++i) {
      const float midpoint = midpoints[i];
      const int negative = midpoint < 0.0f, k = cell(midpoint);
      threshold[negative][k] = midpoint;
      // Every cell of larger numbers counts one midpoint more below it.
      if (negative)
        for (int j = 0; j < k; ++j) ++code[1][j];
      for (int j = negative ? 0 : k + 1; j < kCount; ++j) ++code[0][j];
    }
  }
  uint8_t nearest(float x) const {
    const int negative = int(bits_of(x) >> 31), k = cell(x);
    return uint8_t(code[negative][k] + (x > threshold[negative][k]));
  }
};
// The dynamic map for constants of weights; for blocks of an optimizer's state, unsigned and signed.
extern DynamicCells dynamic_cells, block_cells[2];
extern float block_values[2][256];

}  // namespace qlora
