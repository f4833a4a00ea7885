#include "tables.h"

namespace qlora {

float dynamic_map[256];
DynamicCells dynamic_cells, block_cells[2];
float block_values[2][256];

bool fill_cells(const float* levels, Cells& cells) {
  const float infinity = __builtin_inff();
  int below = 0;
  for (int cell = -15; cell <= 15; ++cell) {
    cells.code[cell & 31] = below;
    cells.level[cell & 31] = cells.next[cell & 31] = levels[below];
    cells.threshold[cell & 31] = infinity;
    const float midpoint = below < 15 ? (levels[below] + levels[below + 1]) / 2 : infinity;
    if (midpoint * kCells < float(cell) + 0.5f) {
      cells.threshold[cell & 31] = midpoint;
      cells.next[cell & 31] = levels[below + 1];
      ++below;
    }
  }
  for (int i = 0; i < 15; ++i) {  // each midpoint in a cell of its own, and away from its border
    const float at = (levels[i] + levels[i + 1]) / 2 * kCells,
                next = i < 14 ? (levels[i + 1] + levels[i + 2]) / 2 * kCells : infinity;
    const float cell = __builtin_floorf(at + 0.5f), rest = at + 0.5f - cell;
    if (__builtin_floorf(next + 0.5f) == cell || rest < 0.01f || rest > 0.99f) return false;
  }
  return below == 15;
}

}  // namespace qlora

using namespace qlora;

// dynamic [256], midpoints [255]; values and midpoints of 8-bit blocks, unsigned and signed: the tables of the
// reference, so that none is written down twice.
extern "C" void qlora_initialize(const float* dynamic, const float* midpoints, const float* const* values,
                                 const float* const* edges) {
  for (int is_signed = 0; is_signed < 2; ++is_signed) {
    for (int i = 0; i < 256; ++i) block_values[is_signed][i] = values[is_signed][i];
    block_cells[is_signed].fill(edges[is_signed]);
  }
  for (int i = 0; i < 256; ++i) dynamic_map[i] = dynamic[i];
  dynamic_cells.fill(midpoints);
}

// Whether values find their codes under these levels [16] here.
extern "C" int qlora_supports_levels(const float* levels) {
  Cells cells;
  return fill_cells(levels, cells);
}
