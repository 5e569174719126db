// Checks of routing tables: see routing.h.
#include "binding/routing.h"

namespace arfast {

void check_offsets(const char* op, const Tensor& offsets, int64_t num_rows) {
  const int64_t last = offsets.size(0) - 1;
  const auto* values = static_cast<const int32_t*>(offsets.data_ptr());
  const auto reject = [&](int64_t index) {
    fail(op, "offsets", "rise from 0 to the number of rows, " + std::to_string(num_rows) + ", without decreasing",
         std::to_string(values[index]) + " at index " + std::to_string(index));
  };
  if (values[0] != 0) reject(0);
  for (int64_t i = 1; i <= last; ++i) {
    if (values[i] < values[i - 1] || values[i] > num_rows) reject(i);
  }
  if (values[last] != num_rows) reject(last);
}

Tensor invert_position(const char* op, const Tensor& position) {
  const int64_t count = position.numel();
  const auto* rows = static_cast<const int32_t*>(position.data_ptr());
  Tensor choices = new_empty(position, {count}, ScalarType::Int);
  auto* choice = static_cast<int32_t*>(choices.data_ptr());
  for (int64_t i = 0; i < count; ++i) choice[i] = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= count || choice[rows[i]] != -1) {
      fail(op, "position", "name every row in [0, T * K = " + std::to_string(count) + ") once",
           std::to_string(rows[i]) + " for choice " + std::to_string(i));
    }
    choice[rows[i]] = static_cast<int32_t>(i);
  }
  return choices;
}

}  // namespace arfast
