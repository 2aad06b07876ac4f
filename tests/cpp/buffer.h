#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

// Device memory of the C++ tests: n elements that end where the allocation ends and begin `offset` elements after a
// 512-byte boundary, such as PyTorch's allocator gives. Unwritten elements are NaN.
template <class S>
struct Buffer {
  static constexpr std::align_val_t alignment{512};
  static void release(char* p) { ::operator delete(p, alignment); }
  std::unique_ptr<char, decltype(&release)> memory{nullptr, &release};
  S* data;
  int64_t n;

  explicit Buffer(int64_t count, int64_t offset = 0) : n(count) {
    memory.reset(static_cast<char*>(::operator new((count + offset) * sizeof(S) + 1, alignment)));
    data = reinterpret_cast<S*>(memory.get()) + offset;
    poison();
  }
  void poison() { std::memset(static_cast<void*>(data), 0xff, n * sizeof(S)); }
  template <class Random>
  void fill(Random& random) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<S>(static_cast<float>(2 * normal(random)));
  }
  std::vector<char> bits() const {
    const char* const begin = reinterpret_cast<const char*>(data);
    return {begin, begin + n * sizeof(S)};
  }
};
