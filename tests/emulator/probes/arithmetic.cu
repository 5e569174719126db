// Probes of built-in functions: conversions, bit operations, warp collectives, atomic operations, streaming accesses.
#include "emulator/probes/probe.h"

namespace probe {
namespace {

__global__ void warp_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x, full = 0xffffffffu;
  const int value = 3 * static_cast<int>(lane);
  const unsigned results[] = {
      static_cast<unsigned>(__shfl_sync(full, value, 5)),
      static_cast<unsigned>(__shfl_sync(full, value, 3, 8)),
      static_cast<unsigned>(__shfl_xor_sync(full, value, 7)),
      static_cast<unsigned>(__shfl_up_sync(full, value, 2, 8)),
      static_cast<unsigned>(__shfl_down_sync(full, value, 3, 16)),
      __ballot_sync(full, lane % 3 == 0),
      static_cast<unsigned>(__any_sync(full, lane == 40)),
      static_cast<unsigned>(__all_sync(full, lane < 32)),
      __match_any_sync(full, lane % 5),
      __reduce_add_sync(full, lane),
      __reduce_max_sync(full, lane ^ 21u),
      static_cast<unsigned>(__reduce_min_sync(full, static_cast<int>(lane) - 16)),
      __reduce_or_sync(full, 1u << lane % 7),
      __reduce_and_sync(full, ~(1u << lane % 7)),
      static_cast<unsigned>(__shfl_xor_sync(full, 0.5f * static_cast<float>(lane), 1) * 2.0f),
      static_cast<unsigned>(__shfl_sync(full, (1ull << 40) + lane, 9) >> 38) + (ptx::elect_one() ? 1000u : 0u),
  };
  for (int i = 0; i < 16; ++i) out[32 * i + lane] = results[i];
}

const char* warp_functions() {
  Memory<unsigned> out(16 * 32, "out");
  const char* error = finish(launch(warp_kernel, {dim3(1), dim3(32)}, nullptr, out.get()));
  return error ? error : expect(out, [](unsigned i) -> unsigned {
    const unsigned lane = i % 32;
    unsigned thirds = 0, same = 0;
    for (unsigned other = 0; other < 32; ++other) {
      if (other % 3 == 0) thirds |= 1u << other;
      if (other % 5 == lane % 5) same |= 1u << other;
    }
    const unsigned results[] = {15,
                                3 * (lane / 8 * 8 + 3),
                                3 * (lane ^ 7),
                                3 * (lane % 8 < 2 ? lane : lane - 2),
                                3 * (lane % 16 < 13 ? lane + 3 : lane),
                                thirds,
                                0,
                                1,
                                same,
                                496,
                                31,
                                0u - 16,
                                127,
                                ~127u,
                                lane ^ 1,
                                4u + (lane == 0 ? 1000u : 0u)};
    return results[i / 32];
  });
}

__global__ void bits_kernel(const float* in, unsigned* out) {
  const int t = threadIdx.x;
  const float x = in[t], y = in[(t + 1) % 32];
  const unsigned u = __float_as_uint(x);
  const unsigned results[] = {ptx::pack_bf16x2(x, y),
                              ptx::pack_f16x2(x, y),
                              static_cast<unsigned>(__popc(u)),
                              static_cast<unsigned>(__clz(static_cast<int>(u))),
                              static_cast<unsigned>(__ffs(static_cast<int>(u))),
                              __brev(u),
                              __umulhi(u, 0x12345678u),
                              __float_as_uint(__fmul_rn(x, y)),
                              __float_as_uint(__fadd_rn(x, y)),
                              static_cast<unsigned>(__popcll(static_cast<unsigned long long>(u) << 20))};
  for (int i = 0; i < 10; ++i) out[32 * i + t] = results[i];
}

// Rounds a float to `bits` mantissa bits, exponents as wide as needed: the nearest multiple, ties to even, in double.
double rounded(double x, int bits, int lowest) {
  if (x == 0 || x != x) return x;
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 1 - bits, lowest));
  return std::nearbyint(x / unit) * unit;
}

const char* bit_functions() {
  Memory<float> in(32, "in");
  Memory<unsigned> out(10 * 32, "out");
  for (int i = 0; i < 32; ++i) in[i] = std::ldexp(static_cast<float>(i * i * 7919 % 4099) - 2000.3f, i % 22 - 14);
  in[3] = 0.0f;
  in[4] = -0.0f;
  in[5] = 1.00390625f;  // a tie of bfloat16
  in[6] = 1.01171875f;
  in[7] = 65519.0f;  // the largest number that float16 rounds down
  const char* error = finish(launch(bits_kernel, {dim3(1), dim3(32)}, nullptr, in.get(), out.get()));
  if (error != nullptr) return error;
  for (int i = 0; i < 32; ++i) {
    for (int half = 0; half < 2; ++half) {
      const float x = in[(i + half) % 32];
      const unsigned bf16 = out[i] >> (16 * half) & 0xffff, f16 = out[32 + i] >> (16 * half) & 0xffff;
      float bf16_value;
      const unsigned wide = bf16 << 16;
      memcpy(&bf16_value, &wide, 4);
      const int exponent = static_cast<int>(f16 >> 10 & 31);
      double f16_value =
          std::ldexp(static_cast<double>(f16 & 1023) + (exponent > 0 ? 1024 : 0), std::max(exponent, 1) - 25);
      if ((f16 & 0x8000) != 0) f16_value = -f16_value;
      if (bf16_value != rounded(x, 7, -133)) return "wrong result: pack_bf16x2";
      if (std::fabs(x) < 65520 && f16_value != rounded(x, 10, -24)) return "wrong result: pack_f16x2";
    }
    unsigned u;
    memcpy(&u, &in[i], 4);
    unsigned ones = 0, leading = 32, first = 0, reversed = 0;
    for (unsigned bit = 0; bit < 32; ++bit) {
      if ((u >> bit & 1) == 0) continue;
      ones++;
      leading = 31 - bit;
      if (first == 0) first = bit + 1;
      reversed |= 1u << (31 - bit);
    }
    const unsigned high = static_cast<unsigned>(static_cast<unsigned long long>(u) * 0x12345678ull >> 32);
    const float product = in[i] * in[(i + 1) % 32], sum = in[i] + in[(i + 1) % 32];
    if (out[64 + i] != ones || out[320 - 32 + i] != ones) return "wrong result: __popc";
    if (out[96 + i] != leading || out[128 + i] != first) return "wrong result: __clz or __ffs";
    if (out[160 + i] != reversed || out[192 + i] != high) return "wrong result: __brev or __umulhi";
    if (memcmp(&out[224 + i], &product, 4) != 0 || memcmp(&out[256 + i], &sum, 4) != 0)
      return "wrong result: __fmul_rn";
  }
  return nullptr;
}

__global__ void functions_kernel(const float* in, float* out) {
  const int t = threadIdx.x;
  const float x = in[t];
  const float results[] = {ptx::exp2_approx(x), ptx::log2_approx(fabsf(x)), exp2f(x), __expf(x),
                           __logf(fabsf(x)),    rsqrtf(fabsf(x)),           tanhf(x), fmaf(x, x, 1.0f)};
  for (int i = 0; i < 8; ++i) out[64 * i + t] = results[i];
}

const char* functions() {
  Memory<float> in(64, "in"), out(8 * 64, "out");
  for (int i = 0; i < 64; ++i) in[i] = (static_cast<float>(i) - 31.5f) / 3;
  const char* error = finish(launch(functions_kernel, {dim3(1), dim3(64)}, nullptr, in.get(), out.get()));
  if (error != nullptr) return error;
  for (int i = 0; i < 64; ++i) {
    const double x = in[i], y = std::fabs(x);
    const double exact[] = {std::exp2(x), std::log2(y),     std::exp2(x), std::exp(x),
                            std::log(y),  1 / std::sqrt(y), std::tanh(x), x * x + 1};
    for (int f = 0; f < 8; ++f) {
      // The approximations' errors grow with the argument; the logarithms' are absolute near 1.
      if (!(std::fabs(out[64 * f + i] - exact[f]) <= 2e-6 * std::max(1.0, std::fabs(exact[f])))) {
        return "wrong result: exp2, log2, exp, log, rsqrt, tanh or fma";
      }
    }
  }
  return nullptr;
}

__global__ void atomics_kernel(int* s, unsigned* u, unsigned long long* wide, float* f) {
  const int t = threadIdx.x;
  atomicAdd(&s[0], t - 5);
  atomicMin(&s[1], -t);
  atomicMax(&s[2], t);
  atomicAnd(&u[0], ~(1u << t % 8));
  atomicOr(&u[1], 1u << t % 8);
  atomicMax(&wide[0], (1ull << 40) + static_cast<unsigned long long>(t));
  atomicAdd(&wide[1], 1ull << 33);
  atomicAdd(&f[0], 0.5f);
  if (atomicCAS(&u[2], 0u, 100u + static_cast<unsigned>(t)) == 0u) atomicAdd(&u[3], 1u);
  if (atomicExch(&u[4], 7u) == 0u) atomicAdd(&u[3], 10u);
}

const char* atomics() {
  Memory<int> s(3, "s");
  Memory<unsigned> u(5, "u");
  Memory<unsigned long long> wide(2, "wide");
  Memory<float> f(1, "f");
  u[0] = 0xffffu;
  const char* error =
      finish(launch(atomics_kernel, {dim3(2), dim3(64)}, nullptr, s.get(), u.get(), wide.get(), f.get()));
  if (error != nullptr) return error;
  const bool right = s[0] == 2 * (63 * 32 - 5 * 64) && s[1] == -63 && s[2] == 63 && u[0] == 0xff00u && u[1] == 0xffu &&
                     u[2] >= 100 && u[2] < 164 && u[3] == 11 && u[4] == 7 && wide[0] == (1ull << 40) + 63 &&
                     wide[1] == 128ull << 33 && f[0] == 64.0f;
  return right ? nullptr : "wrong result: atomic operations";
}

__global__ void streaming_kernel(const uint4* in, uint4* out) {
  ptx::prefetch_l2(in + threadIdx.x);
  uint4 value = ptx::load_streaming(in + threadIdx.x);
  value.y += __ldg(&in[threadIdx.x].z);
  ptx::store_streaming(out + threadIdx.x, value);
}

const char* streaming() {
  Memory<uint32_t> in(128, "in"), out(128, "out");
  for (int i = 0; i < 128; ++i) in[i] = static_cast<uint32_t>(i);
  const char* error = finish(launch(streaming_kernel, {dim3(1), dim3(32)}, nullptr,
                                    reinterpret_cast<const uint4*>(in.get()), reinterpret_cast<uint4*>(out.get())));
  return error ? error : expect(out, [](uint32_t i) { return i % 4 == 1 ? 2 * i + 1 : i; });
}

const Register all{
    {"warp functions", nullptr, warp_functions}, {"bit functions", nullptr, bit_functions},
    {"functions", nullptr, functions},           {"atomic operations", nullptr, atomics},
    {"streaming accesses", nullptr, streaming},
};

}  // namespace
}  // namespace probe
