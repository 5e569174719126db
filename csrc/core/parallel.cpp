// Holds the parallel_for that the CPU implementations use.
#include "core/parallel.h"

namespace arfast {
namespace {

void serial_for(int64_t begin, int64_t end, int64_t, RangeFunction f, void* context) { f(begin, end, context); }

ParallelFor installed = serial_for;

}  // namespace

void set_parallel_for(ParallelFor parallel_for) { installed = parallel_for; }
ParallelFor get_parallel_for() { return installed; }

}  // namespace arfast
