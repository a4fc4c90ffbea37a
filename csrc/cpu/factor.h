// The right factor of a product, packed as Kernels::multiply takes it.
#pragma once

#include <algorithm>

#include "cpu/data.h"

namespace mas_fast::cpu {

// w [K, C] in memory, one of whose strides is 1.
template <class T>
struct Factor {
  const T* data;
  int64_t row_stride, column_stride;

  // Packs some rows of a panel of columns to dst [rows, tile_columns], zero beyond the columns.
  void pack(int64_t row, int64_t rows, int64_t column, int64_t columns, T* dst) const {
    const Kernels<T>& kernel = kernels_for<T>();
    constexpr Input type = sizeof(T) == sizeof(double) ? Input::kFloat64 : Input::kFloat32;
    const T* const from = data + row * row_stride + column * column_stride;
    if (column_stride == 1) {
      kernel.pack(type, {from, row_stride, 1}, rows, columns, kernel.tile_columns, Magnitude::kPlain, dst);
      return;
    }
    if (columns < kernel.tile_columns) std::fill_n(dst, rows * kernel.tile_columns, T(0));
    kernel.transpose(type, {from, column_stride, row_stride}, columns, rows, dst, kernel.tile_columns);
  }
};

}  // namespace mas_fast::cpu
