// Tests csrc/core for the CPU target that it is compiled for: conversions over every 16-bit value, exp and tanh against
// double precision, reductions and partial vectors at every length, the ranges that parallel_for hands out, and phases.
#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "core/cpu_target.h"
#include "core/parallel.h"
#include "core/phases.h"
#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

int failures = 0;

// Prints the first failures of a run; the exit status counts all.
template <typename... Values>
void expect(bool condition, const char* what, Values... values) {
  if (condition) return;
  if (++failures > 20) return;
  std::printf("FAILED %s:", what);
  (std::printf(" %.9g", static_cast<double>(values)), ...);
  std::printf("\n");
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// What a binary format with `mantissa` stored bits and smallest exponent `min_exponent` holds of x: nearest, ties to
// even, infinity from half a step beyond `largest`.
double round_to_format(float x, int mantissa, int min_exponent, double largest) {
  if (!std::isfinite(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const double step = std::ldexp(1.0, exponent - mantissa);
  const double rounded = std::nearbyint(x / step) * step;
  return std::fabs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

double exact_value(uint16_t bits, int mantissa, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, exponent = bits >> mantissa & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << mantissa) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa);
}

// The vector load and store agree with the scalar functions, and those with the format.
template <typename T>
void test_conversions(int mantissa, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -mantissa), bias);
  std::vector<float> floats = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 65519.996f, 65520.0f, FLT_MAX, -FLT_MAX, FLT_MIN};
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T value{static_cast<uint16_t>(bits)};
    const float wide = to_acc(value);
    const double exact = exact_value(value.bits, mantissa, exponent_bits);
    expect(same(wide, exact), "to_acc", bits, wide, exact);
    const uint16_t back = from_acc<T>(wide).bits;
    expect(back == bits || std::isnan(wide), "round trip", bits, back);
    // Halfway to the next value and one float to either side of it: where rounding decides.
    const float middle = static_cast<float>((exact + exact_value(value.bits + 1, mantissa, exponent_bits)) / 2);
    floats.insert(floats.end(), {wide, middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)});
  }
  for (uint64_t bits = 0; bits < 0x100000000u; bits += 4099) floats.push_back(from_bits(static_cast<uint32_t>(bits)));
  floats.resize(floats.size() / kFloatLanes * kFloatLanes);
  for (size_t i = 0; i < floats.size(); i += kFloatLanes) {
    T stored[kFloatLanes];
    store(stored, load(&floats[i]));
    const VecF loaded = load(stored);
    for (int lane = 0; lane < kFloatLanes; ++lane) {
      const float x = floats[i + lane], narrow = to_acc(from_acc<T>(x));
      const double exact = round_to_format(x, mantissa, 1 - bias, largest);
      expect(same(narrow, exact), "from_acc", x, narrow, exact);
      expect(same(to_acc(stored[lane]), exact), "store", x, to_acc(stored[lane]), exact);
      expect(same(loaded[lane], exact), "load", x, loaded[lane], exact);
    }
  }
}

// Units in the last place of a float at `exact`.
double ulps(double value, double exact) {
  return std::fabs(value - exact) / std::ldexp(1.0, std::max(std::ilogb(exact), -126) - 23);
}

template <typename F, typename G>
void test_function(const char* name, const F& f, const G& exact_function, float low, float high, double allowed) {
  std::mt19937 random(0);
  std::uniform_real_distribution<float> uniform(low, high);
  double worst = 0;
  for (int i = 0; i < 300000; i += kFloatLanes) {
    VecF x;
    for (int lane = 0; lane < kFloatLanes; ++lane) x[lane] = uniform(random);
    const VecF y = f(x);
    for (int lane = 0; lane < kFloatLanes; ++lane) {
      const double exact = exact_function(static_cast<double>(x[lane]));
      const double error = exact == 0 ? std::fabs(y[lane]) : ulps(y[lane], exact);
      worst = std::max(worst, error);
      expect(error <= allowed, name, x[lane], y[lane], exact, error);
    }
  }
  std::printf("%s on [%g, %g]: %.2f ulp\n", name, low, high, worst);
}

void test_exp_and_tanh() {
  const auto vector_exp = [](VecF x) { return exp(x); };
  const auto vector_tanh = [](VecF x) { return tanh(x); };
  const auto exact_exp = [](double x) { return std::exp(x); };
  const auto exact_tanh = [](double x) { return std::tanh(x); };
  test_function("exp", vector_exp, exact_exp, -87.3f, 88.7f, 2);
  test_function("exp", vector_exp, exact_exp, -1e-3f, 1e-3f, 2);
  test_function("tanh", vector_tanh, exact_tanh, -10.0f, 10.0f, 2);
  test_function("tanh", vector_tanh, exact_tanh, -0.4f, 0.4f, 2);
  test_function("tanh", vector_tanh, exact_tanh, -1e-6f, 1e-6f, 2);
  const float infinity = INFINITY, smallest = FLT_MIN;
  for (const float x : {-88.0f, -103.9f, -104.5f, -1e4f, -FLT_MAX, -infinity}) {
    const float y = exp(splat<VecF>(x))[0];
    expect(y >= 0 && y <= smallest, "exp of a very negative number is 0 or subnormal", x, y);
  }
  expect(exp(splat<VecF>(-infinity))[0] == 0, "exp(-inf)", exp(splat<VecF>(-infinity))[0]);
  for (const float x : {88.73f, 89.5f, 1e4f, FLT_MAX, infinity}) {
    expect(exp(splat<VecF>(x))[0] == infinity, "exp overflows to infinity", x, exp(splat<VecF>(x))[0]);
    expect(tanh(splat<VecF>(x))[0] == 1 && tanh(splat<VecF>(-x))[0] == -1, "tanh saturates", x);
  }
  expect(exp(VecF{})[0] == 1 && tanh(VecF{})[0] == 0, "exp(0), tanh(0)");
  expect(std::isnan(exp(splat<VecF>(NAN))[0]) && std::isnan(tanh(splat<VecF>(NAN))[0]), "NaN stays NaN");
}

// A row of every length between canaries: each element is visited once and nothing beyond the row is written.
template <typename T>
void test_rows() {
  for (int size = 0; size <= 3 * kLanes<T> + 1; ++size) {
    for (int offset = 0; offset < 3; ++offset) {
      std::vector<T> in(size + offset), out(size + offset + kLanes<T>);
      for (int i = 0; i < size; ++i) in[offset + i] = from_acc<T>(static_cast<Acc<T>>(i % 50 - 20));
      for (T& x : out) x = from_acc<T>(-77);
      Vec<T> total{}, largest = splat<Vec<T>>(-1000);
      for_each_vector<T>(size, [&](int64_t i, int count) {
        const Vec<T> v = load_lanes(in.data() + offset + i, count);
        total += v;
        largest = max(largest, load_partial(in.data() + offset + i, count, -1000));
        store_lanes(out.data() + offset + i, v, count);
      });
      double sum = 0, maximum = -1000;
      for (int i = 0; i < size; ++i) {
        const double x = to_acc(in[offset + i]);
        sum += x;
        maximum = std::max(maximum, x);
        expect(to_acc(out[offset + i]) == x, "row copy", size, offset, i);
      }
      expect(reduce_add(total) == sum, "reduce_add", size, reduce_add(total), sum);
      expect(reduce_max(largest) == maximum, "reduce_max", size, reduce_max(largest), maximum);
      for (size_t i = 0; i < out.size(); ++i) {
        const bool inside = static_cast<int>(i) >= offset && static_cast<int>(i) < offset + size;
        expect(inside || to_acc(out[i]) == -77, "write outside the row", size, offset, i);
      }
    }
  }
}

// Three threads, ranges that never fall under the grain but for the last one.
void threaded_for(int64_t begin, int64_t end, int64_t grain, RangeFunction f, void* context) {
  const int64_t step = std::max(grain, (end - begin + 2) / 3);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += step)
    threads.emplace_back([=] { f(first, std::min(first + step, end), context); });
  for (std::thread& thread : threads) thread.join();
}

void test_parallel() {
  for (const ParallelFor implementation : {get_parallel_for(), ParallelFor{threaded_for}}) {
    set_parallel_for(implementation);
    for (const int64_t count : {0, 1, 2, 7, 64, 1000}) {
      for (const int64_t grain : {1, 3, 64, 5000}) {
        std::vector<std::atomic<int>> visits(count), blocks((count + grain - 1) / grain);
        parallel_for(count, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++visits[i];
        });
        parallel_blocks(count, grain, [&](int64_t block, int64_t begin, int64_t end) {
          expect(begin == block * grain && end == std::min(begin + grain, count), "block range", block, begin, end);
          ++blocks[block];
        });
        for (auto& n : visits) expect(n == 1, "parallel_for visits each index once", count, grain, n.load());
        for (auto& n : blocks) expect(n == 1, "parallel_blocks visits each block once", count, grain, n.load());
      }
    }
  }
  expect(grain_for(0) == 32768 && grain_for(1000) == 32 && grain_for(1 << 20) == 1, "grain_for");
}

// One thread calls the function for every index in turn, as within another parallel region.
void indexwise_for(int64_t begin, int64_t end, int64_t, RangeFunction f, void* context) {
  for (int64_t i = begin; i < end; ++i) f(i, i + 1, context);
}

// More threads than cores, some of which come when others have done everything.
void late_for(int64_t, int64_t end, int64_t, RangeFunction f, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 7; ++i) {
    threads.emplace_back([=] {
      std::this_thread::sleep_for(std::chrono::microseconds(200 * (i / 2)));
      f(0, end, context);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Every task of a phase sees what all tasks of the one before it wrote.
void test_phases() {
  constexpr int64_t kCounts[] = {5, 1, 64, 3, 1, 1, 100, 0, 17};
  const ParallelFor before = get_parallel_for();
  for (const ParallelFor implementation :
       {before, ParallelFor{threaded_for}, ParallelFor{indexwise_for}, ParallelFor{late_for}}) {
    set_parallel_for(implementation);
    for (int round = 0; round < 50; ++round) {
      const int64_t num_shares = std::array{1, 4, 100}[round % 3];  // fewer and more than tasks and threads
      std::vector<std::vector<int64_t>> sums;
      for (const int64_t count : kCounts) sums.emplace_back(count, -1);
      run_phases(num_shares, [&](Phases& phases) {
        for (size_t phase = 0; phase < std::size(kCounts); ++phase) {
          phases.run(kCounts[phase], [&](int64_t task) {
            int64_t sum = 1;
            for (size_t i = 0; i < phase; ++i) {
              for (const int64_t value : sums[i]) sum = (sum + value) % 1000;
            }
            expect(sums[phase][task] == -1, "a task of a phase runs once", phase, task);
            sums[phase][task] = sum;
          });
        }
      });
      std::vector<int64_t> all;
      for (size_t phase = 0; phase < std::size(kCounts); ++phase) {
        int64_t expected = 1;
        for (const int64_t value : all) expected = (expected + value) % 1000;
        for (const int64_t value : sums[phase]) expect(value == expected, "value of a phase", phase, value, expected);
        all.insert(all.end(), sums[phase].begin(), sums[phase].end());
      }
    }
  }
  set_parallel_for(before);
}

// What a task throws reaches the caller, and no thread waits for it: the other tasks run all the same.
void test_throwing_phases() {
  const ParallelFor before = get_parallel_for();
  for (const ParallelFor implementation :
       {before, ParallelFor{threaded_for}, ParallelFor{indexwise_for}, ParallelFor{late_for}}) {
    set_parallel_for(implementation);
    std::atomic<int64_t> runs{0};
    bool thrown = false;
    try {
      run_phases(4, [&](Phases& phases) {
        for (int phase = 0; phase < 3; ++phase) {
          phases.run(64, [&](int64_t task) {
            ++runs;
            if (phase == 1 && task % 7 == 3) throw std::bad_alloc();
          });
        }
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    expect(thrown && runs == 3 * 64, "a task that throws", runs.load());
  }
  set_parallel_for(before);
}

// The name of this target, to compare with what the machine can run.
constexpr CpuTarget kTarget = kVectorBytes == 64   ? CpuTarget::kAvx512
                              : kVectorBytes == 32 ? CpuTarget::kAvx2
                                                   : CpuTarget::kBaseline;

}  // namespace

int run() {
  test_conversions<BFloat16>(7, 8);
  test_conversions<Float16>(10, 5);
  test_exp_and_tanh();
  test_rows<float>();
  test_rows<double>();
  test_rows<BFloat16>();
  test_rows<Float16>();
  test_parallel();
  test_phases();
  test_throwing_phases();
  std::printf("%d lanes: %d failures\n", kFloatLanes, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace arfast::ARFAST_CPU_TARGET

int main() {
  using namespace arfast;
  if (ARFAST_CPU_TARGET::kTarget > cpu_target()) {
    std::printf("this machine does not have the target\n");
    return 77;
  }
  return ARFAST_CPU_TARGET::run();
}
