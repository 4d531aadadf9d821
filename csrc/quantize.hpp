// Floats to panels: tenfold/quantization.py and tenfold/panels.py, to the bit.
#pragma once

#include "panel.hpp"
#include "pool.hpp"

namespace tenfold {

// `rows` (a multiple of 16) of `columns` (a multiple of 32) finite floats below 2^127 to panels, which must
// be zero. `importance` (columns) weighs squared errors, or is null.
void quantize(Pool& pool, Format format, const float* weights, int rows, int columns, const float* importance,
              uint8_t* panels);

}  // namespace tenfold
