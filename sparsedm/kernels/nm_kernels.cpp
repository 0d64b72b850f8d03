// Linear layers and 2-D convolutions with N:4 sparse weights, float32.
//
// Vectorised over tokens or pixels, not over outputs: every kept weight is broadcast and multiplied with one row of a panel, in
// which the same input of up to 128 tokens or output pixels lies side by side. The zeros are never loaded. Plain C interface, no
// torch headers; the vectors are GCC/Clang extensions, as wide as the machine has them.
//
// Weights are [outputs, inputs / 4 * kept] values and two-bit positions in the same order, rows starting at whole bytes. The
// inputs of a convolution are (kernel row, kernel column, channel), channel fastest.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kMaxVectors = 8;   // accumulators of one output row: enough to hide the latency of fused multiply-add
constexpr int kInputs = 64;      // inputs per panel slice: 64 x 128 floats are 32 KB, the L1 cache
constexpr int kOutputs = 256;    // outputs per block: their sums stay in the L2 cache

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

// Transpose a square of kLanes x kLanes: log2(kLanes) perfect shuffles of row i with row i + kLanes / 2.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  typedef Indices<I...> type;
};
template <int... I>
static inline Vec low(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, ((I & 1) * kLanes + I / 2)...);
}
template <int... I>
static inline Vec high(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, ((I & 1) * kLanes + I / 2 + kLanes / 2)...);
}

static inline void transpose(Vec* rows) {
  typename MakeIndices<kLanes>::type indices;
  for (int stage = kLanes; stage > 1; stage /= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = low(rows[i], rows[i + kLanes / 2], indices);
      next[2 * i + 1] = high(rows[i], rows[i + kLanes / 2], indices);
    }
    std::memcpy(rows, next, sizeof(next));
  }
}

// to[c * to_stride + r] = from[r * from_stride + c] + add[c], for r < rows, c < columns (add may be null).
static void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= columns) {
        Vec tile[kLanes];
        for (int i = 0; i < kLanes; ++i) tile[i] = load(from + (r + i) * from_stride + c);
        transpose(tile);
        for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_stride + r, tile[i]);
      } else {
        for (int64_t i = r; i < std::min(r + kLanes, rows); ++i)
          for (int64_t j = c; j < std::min(c + kLanes, columns); ++j) to[j * to_stride + i] = from[i * from_stride + j];
      }
    }
  }
}

// Add the products of `groups` groups of four inputs to the sums [kVectors * kLanes] of one output row.
template <int kKept, int kVectors>
static inline void accumulate(const float* panel, const float* values, const uint8_t* positions, int64_t groups, float* sums) {
  constexpr int width = kVectors * kLanes;
  Vec total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = load(sums + v * kLanes);
  for (int64_t g = 0, bit = 0; g < groups; ++g, panel += 4 * width) {
    for (int k = 0; k < kKept; ++k, bit += 2) {
      const float* row = panel + ((positions[bit >> 3] >> (bit & 7)) & 3) * width;  // at most 3: never outside the group
      const Vec value = *values++ - Vec{};
      for (int v = 0; v < kVectors; ++v) total[v] += value * load(row + v * kLanes);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, total[v]);
}

struct Weights {
  const float* values;
  const uint8_t* positions;
  const float* bias;
  int64_t inputs, outputs;
};

// Start the sums of outputs first..last with their bias.
template <int kWidth>
static void start(const Weights& w, int64_t first, int64_t last, float* sums) {
  for (int64_t o = first; o < last; ++o) std::fill_n(sums + (o - first) * kWidth, kWidth, w.bias ? w.bias[o] : 0.0f);
}

// Add the products of inputs input..input + count, whose panel rows begin at `panel`, to the sums of outputs first..last.
template <int kKept, int kVectors>
static void add(const Weights& w, const float* panel, int64_t input, int64_t count, int64_t first, int64_t last, float* sums) {
  const int64_t row = w.inputs / 4 * kKept, offset = input / 4 * kKept;
  for (int64_t o = first; o < last; ++o)
    accumulate<kKept, kVectors>(panel, w.values + o * row + offset, w.positions + (o * row + offset) / 4, count / 4,
                                sums + (o - first) * kVectors * kLanes);
}

struct Linear {
  const float* x;
  float* y;
  int64_t tokens;

  int64_t columns() const { return tokens; }

  template <int kKept, int kVectors>
  int run(const Weights& w) const {
    constexpr int64_t width = kVectors * kLanes;
    const int64_t blocks = (tokens + width - 1) / width, chunks = (w.outputs + kOutputs - 1) / kOutputs;
    float* panels = static_cast<float*>(std::aligned_alloc(64, blocks * w.inputs * width * sizeof(float)));
    if (!panels) return 1;
#pragma omp parallel
    {
      alignas(64) float sums[kOutputs * width];
#pragma omp for
      for (int64_t b = 0; b < blocks; ++b) {
        float* panel = panels + b * w.inputs * width;
        const int64_t count = std::min(width, tokens - b * width);
        if (count < width) std::memset(panel, 0, w.inputs * width * sizeof(float));
        transpose_block(x + b * width * w.inputs, w.inputs, panel, width, count, w.inputs);
      }
#pragma omp for collapse(2)
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t first = c * kOutputs, last = std::min<int64_t>(first + kOutputs, w.outputs);
          start<width>(w, first, last, sums);
          for (int64_t i = 0; i < w.inputs; i += kInputs)
            add<kKept, kVectors>(w, panels + (b * w.inputs + i) * width, i, std::min<int64_t>(kInputs, w.inputs - i), first, last, sums);
          transpose_block(sums, width, y + b * width * w.outputs + first, w.outputs, last - first, std::min(width, tokens - b * width));
        }
    }
    std::free(panels);
    return 0;
  }
};

struct Convolution {
  const float* x;  // [images, channels, height, width_in]
  float* y;        // [images, outputs, out_height, out_width]
  int64_t images, channels, height, width_in, kernel_h, kernel_w, stride, padding;

  int64_t out_height() const { return (height + 2 * padding - kernel_h) / stride + 1; }
  int64_t out_width() const { return (width_in + 2 * padding - kernel_w) / stride + 1; }
  int64_t columns() const { return images * out_height() * out_width(); }

  // Panel rows of inputs input..input + count for `pixels` output pixels from `pixel` on, zeros in the padding.
  template <int kWidth>
  void fill(float* panel, int64_t input, int64_t count, int64_t pixel, int64_t pixels) const {
    const int64_t oh = out_height(), ow = out_width();
    for (int64_t done = 0; done < pixels;) {  // one run of pixels in one output row at a time
      const int64_t image = (pixel + done) / (oh * ow), oy = (pixel + done) / ow % oh, ox = (pixel + done) % ow;
      const int64_t run = std::min(ow - ox, pixels - done);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = (input + i) / channels, c = (input + i) % channels;
        const int64_t iy = oy * stride + position / kernel_w - padding, ix = ox * stride + position % kernel_w - padding;
        float* to = panel + i * kWidth + done;
        if (iy < 0 || iy >= height) {
          std::fill_n(to, run, 0.0f);
          continue;
        }
        const float* from = x + ((image * channels + c) * height + iy) * width_in;
        int64_t j = 0;
        for (; j < run && ix + j * stride < 0; ++j) to[j] = 0.0f;
        const int64_t inside = std::min(run, (width_in - ix + stride - 1) / stride);
        if (stride == 1)
          for (; j < inside; ++j) to[j] = from[ix + j];
        else
          for (; j < inside; ++j) to[j] = from[ix + j * stride];
        for (; j < run; ++j) to[j] = 0.0f;
      }
      done += run;
    }
  }

  template <int kKept, int kVectors>
  int run(const Weights& w) const {
    constexpr int64_t width = kVectors * kLanes;
    const int64_t area = out_height() * out_width(), total = images * area, blocks = (total + width - 1) / width;
    // Few pixels, as in the innermost levels of a UNet: share out the outputs as well.
    const int64_t threads = omp_get_max_threads();
    const int64_t chunks = std::max<int64_t>(1, std::min((threads + blocks - 1) / blocks, w.outputs / 16));
    const int64_t chunk = (w.outputs + chunks - 1) / chunks;
    int failed = 0;
#pragma omp parallel
    {
      alignas(64) float panel[kInputs * width];
      float* sums = static_cast<float*>(std::aligned_alloc(64, chunk * width * sizeof(float)));
      if (!sums) {
#pragma omp atomic write
        failed = 1;
      }
#pragma omp for collapse(2)
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t first = c * chunk, last = std::min(first + chunk, w.outputs);
          const int64_t pixel = b * width, pixels = std::min(width, total - pixel);
          if (!sums || first >= last) continue;
          if (pixels < width) std::memset(panel, 0, sizeof(panel));
          start<width>(w, first, last, sums);
          for (int64_t i = 0; i < w.inputs; i += kInputs) {
            const int64_t count = std::min<int64_t>(kInputs, w.inputs - i);
            fill<width>(panel, i, count, pixel, pixels);
            add<kKept, kVectors>(w, panel, i, count, first, last, sums);
          }
          for (int64_t done = 0; done < pixels;) {  // the pixels of one image lie side by side
            const int64_t image = (pixel + done) / area, at = (pixel + done) % area, run = std::min(area - at, pixels - done);
            for (int64_t o = first; o < last; ++o)
              std::memcpy(y + (image * w.outputs + o) * area + at, sums + (o - first) * width + done, run * sizeof(float));
            done += run;
          }
        }
      std::free(sums);
    }
    return failed;
  }
};

template <int kKept, class Layer>
static int with_width(const Layer& layer, const Weights& w) {
  // As many columns a block as fill whole blocks evenly: 264 tokens are three blocks of 96, not two of 128 and one of 8.
  const int64_t most = kMaxVectors * kLanes, columns = layer.columns(), blocks = (columns + most - 1) / most;
  switch (((columns + blocks - 1) / blocks + kLanes - 1) / kLanes) {
    case 1: return layer.template run<kKept, 1>(w);
    case 2: return layer.template run<kKept, 2>(w);
    case 3: return layer.template run<kKept, 3>(w);
    case 4: return layer.template run<kKept, 4>(w);
    case 5: return layer.template run<kKept, 5>(w);
    case 6: return layer.template run<kKept, 6>(w);
    case 7: return layer.template run<kKept, 7>(w);
    default: return layer.template run<kKept, 8>(w);
  }
}

// 0: done; 1: no memory; 2: a shape that the kernels cannot do.
template <class Layer>
static int dispatch(const Layer& layer, const Weights& w, int64_t kept) {
  if (kept < 1 || kept > 3 || w.inputs < 4 || w.inputs % 4 || w.inputs * kept % 16) return 2;
  if (layer.columns() <= 0 || w.outputs <= 0) return layer.columns() < 0;
  switch (kept) {
    case 1: return with_width<1>(layer, w);
    case 2: return with_width<2>(layer, w);
    default: return with_width<3>(layer, w);
  }
}

// x [tokens, inputs] and y [tokens, outputs], contiguous.
extern "C" int sparsedm_nm4_linear(const float* x, const float* values, const uint8_t* positions, const float* bias, float* y,
                                   int64_t tokens, int64_t inputs, int64_t outputs, int64_t kept) {
  return dispatch(Linear{x, y, tokens}, Weights{values, positions, bias, inputs, outputs}, kept);
}

// x [images, channels, height, width] and y [images, outputs, out height, out width], contiguous.
extern "C" int sparsedm_nm4_conv2d(const float* x, const float* values, const uint8_t* positions, const float* bias, float* y,
                                   int64_t images, int64_t channels, int64_t height, int64_t width, int64_t outputs,
                                   int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding, int64_t kept) {
  if (channels % 4 || stride < 1 || padding < 0) return 2;
  const Convolution layer = {x, y, images, channels, height, width, kernel_h, kernel_w, stride, padding};
  if (layer.out_height() < 1 || layer.out_width() < 1) return 2;
  return dispatch(layer, Weights{values, positions, bias, channels * kernel_h * kernel_w, outputs}, kept);
}
