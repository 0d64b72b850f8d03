// What the kernels share: their results, memory of a thread, transposing.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <utility>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int64_t kOutputs = 256;  // outputs per block: their sums stay in the L2 cache

constexpr int64_t kLargest = 1 << 28;  // side of a picture or kernel, stride, padding

enum { kDone, kNoMemory, kNoKernel };  // what the kernels return

// Whether the sizes are those of a convolution whose kernel fits the padded map, and so small that they do not overflow.
inline bool is_convolution(int64_t images, int64_t height, int64_t width, int64_t kernel_h, int64_t kernel_w, int64_t padding) {
  for (const int64_t size : {height, width, kernel_h, kernel_w})
    if (size < 1 || size > kLargest) return false;
  if (images < 0 || padding < 0 || padding > kLargest) return false;
  return height + 2 * padding >= kernel_h && width + 2 * padding >= kernel_w;
}


// Memory for `count` elements that a thread keeps for its next call, as fresh memory costs a page fault every 4 KB; null if there
// is none. Each T and kTag is another piece.
template <class T, int kTag>
static T* workspace(int64_t count) {
  static thread_local std::unique_ptr<void, void (*)(void*)> memory(nullptr, std::free);
  static thread_local int64_t size = 0;
  const int64_t wanted = (count * sizeof(T) + 127) / 64 * 64;
  if (wanted > size) {
    memory.reset();
    memory.reset(std::aligned_alloc(64, wanted));
    size = memory ? wanted : 0;
  }
  return static_cast<T*>(memory.get());
}

// Transposing a square of words (32 or 64 bits): log2(size) perfect shuffles of row i with row i + size / 2.
template <class Word>
struct Square {
  static constexpr int kSize = kBytes / sizeof(Word);
  typedef Word Row __attribute__((vector_size(kBytes)));
  typedef Word LooseRow __attribute__((vector_size(kBytes), aligned(1), may_alias));

  // Words of a and b in turn, from their first halves or, moved by half a row, from their second ones.
  template <int kMove, int... I>
  static Row shuffled(Row a, Row b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, ((I & 1) * kSize + I / 2 + kMove)...);
#else
    return __builtin_shuffle(a, b, Row{((I & 1) * kSize + I / 2 + kMove)...});  // also before GCC 12
#endif
  }

  static void transpose(const Word* from, int64_t from_stride, Word* to, int64_t to_stride) {
    const std::make_integer_sequence<int, kSize> indices;
    Row rows[kSize];
    for (int i = 0; i < kSize; ++i) rows[i] = *reinterpret_cast<const LooseRow*>(from + i * from_stride);
    for (int stage = kSize; stage > 1; stage /= 2) {
      Row next[kSize];
      for (int i = 0; i < kSize / 2; ++i) {
        next[2 * i] = shuffled<0>(rows[i], rows[i + kSize / 2], indices);
        next[2 * i + 1] = shuffled<kSize / 2>(rows[i], rows[i + kSize / 2], indices);
      }
      std::memcpy(rows, next, sizeof(next));
    }
    for (int i = 0; i < kSize; ++i) *reinterpret_cast<LooseRow*>(to + i * to_stride) = rows[i];
  }
};

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns. Words may lie at any multiple of 2 bytes.
template <class Word>
static void transpose(const void* from_, int64_t from_stride, void* to_, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int size = Square<Word>::kSize;
  const Word* from = static_cast<const Word*>(from_);
  Word* to = static_cast<Word*>(to_);
  for (int64_t r = 0; r < rows; r += size) {
    for (int64_t c = 0; c < columns; c += size) {
      if (r + size <= rows && c + size <= columns) {
        Square<Word>::transpose(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
        continue;
      }
      for (int64_t i = r; i < std::min(r + size, rows); ++i)
        for (int64_t j = c; j < std::min(c + size, columns); ++j)
          std::memcpy(to + j * to_stride + i, from + i * from_stride + j, sizeof(Word));
    }
  }
}
