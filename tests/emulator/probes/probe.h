// Probes: small kernels that use one mechanism each, right (kBug = 0) and with one bug each. The emulator must report
// every bug and nothing else. The right ones are plain CUDA: nvcc builds the same files, to compare a GPU with the
// emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/ptx.cuh"
#include "core/runtime.cuh"

namespace probe {

using namespace arfast;

// A probe launches its kernel and compares the results with a formula: nullptr, or what is wrong.
struct Entry {
  const char* name;
  const char* expected;  // part of the report; nullptr when there must be none
  const char* (*run)();
};

// The probes of all files.
inline std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}
struct Register {
  Register(std::initializer_list<Entry> some) { entries().insert(entries().end(), some); }
};

// Memory that the kernel may access, zero at first, aligned to 256 bytes like a tensor.
template <typename T>
class Memory {
 public:
  Memory(size_t size, const char* name) : size_(size) {
    const size_t bytes = (size * sizeof(T) + 255) / 256 * 256;
#if defined(ARFAST_EMULATED)
    data_ = static_cast<T*>(std::aligned_alloc(256, bytes));
    emulator::register_memory(data_, size * sizeof(T), sizeof(T), name);
#else
    cudaMallocManaged(&data_, bytes);
    (void)name;
#endif
    for (size_t i = 0; i < size; ++i) data_[i] = T();
  }
  ~Memory() {
#if defined(ARFAST_EMULATED)
    emulator::forget_memory();
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  Memory(const Memory&) = delete;
  T& operator[](size_t i) { return data_[i]; }
  T* get() { return data_; }
  size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// After a launch: on a GPU its errors show only now.
inline const char* finish(const char* error) {
#if !defined(ARFAST_EMULATED)
  if (error == nullptr) {
    const cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
#endif
  return error;
}

// nullptr when memory[i] == value(i) for every i, else the first difference.
template <typename T, typename F>
const char* expect(Memory<T>& memory, const F& value) {
  static char text[128];
  for (size_t i = 0; i < memory.size(); ++i) {
    const T wanted = value(i);
    if (memory[i] == wanted) continue;
    std::snprintf(text, sizeof(text), "wrong result: element %zu must be %g, got %g", i, double(wanted),
                  double(memory[i]));
    return text;
  }
  return nullptr;
}

}  // namespace probe
