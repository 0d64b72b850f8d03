// The fast form for AVX-512, in float32: linear layers, and convolutions of 1x1 and 3x3 with stride 1.
//
// Weights lie in slices of a few inputs: values [slice][output][kernel position][group of 4 inputs][kept], two-bit positions in
// the same order. All weights of a slice and an output are unrolled, so that only their positions are read at run time:
// a rotation and a mask make one the displacement of its input's row in the panel.
//
// A panel holds the inputs of a slice for a tile of up to 8 vectors of 16 tokens or output pixels, and stays in the L1 cache:
//     [kernel column][row of the tile, with those above and below that the kernel reaches][input][16 pixels].
// The map is copied once for each kernel column, moved by a pixel, with its zero border; kernel rows are displacements. Narrow
// maps share a vector: it has 16, 8 or 4 columns of 1, 2 or 4 strips. A strip is a few rows of one picture.
#include <omp.h>

#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__BMI2__)
#include <immintrin.h>
#define SPARSEDM_SLICES 1
// What is unrolled has no sanitizer, which would take minutes to compile: the panel's bounds are asserted below, and a test puts
// weights and positions between pages without memory.
#define SPARSEDM_UNROLLED __attribute__((no_sanitize_address, no_sanitize_undefined))
#define SPARSEDM_INLINE SPARSEDM_UNROLLED inline __attribute__((always_inline))

namespace {

constexpr int kLinearInputs = 64, kWideChannels = 16, kNarrowChannels = 8;  // inputs of a slice

// A tile: `kRows` rows of each strip, as many strips as make `kVectors` vectors, `kAtOnce` outputs at a time. Fewer vectors take
// more outputs, as 8 sums at a time hide the latency of a multiply-add.
template <int kKept_, int kKernel_, int kInputs_, int kRows_, int kVectors_, int kAtOnce_>
struct Form {
  static constexpr int kKept = kKept_, kKernel = kKernel_, kInputs = kInputs_, kRows = kRows_, kVectors = kVectors_;
  static constexpr int kAtOnce = kAtOnce_, kStrips = kVectors / kRows, kHigh = kRows + kKernel - 1, kWidth = kVectors * 16;
  // Of an output in a slice.
  static constexpr int kWeights = kKernel * kKernel * kInputs / 4 * kKept, kPositionBytes = kWeights / 4;
  // Floats of the panel, for a strip and a kernel column.
  static constexpr int kStrip = kHigh * kInputs * 16, kColumn = kStrips * kStrip, kFloats = kKernel * kColumn;
  static_assert(kWeights % 4 == 0 && kPositionBytes >= 8 && kVectors % kRows == 0);

  // Where in the panel a vector begins, and the group of a weight for the first vector.
  static constexpr int vector(int v) { return v / kRows * kStrip + v % kRows * kInputs * 16; }
  static constexpr int group(int weight) {
    const int number = weight / kKept, position = number / (kInputs / 4), group = number % (kInputs / 4);
    return position % kKernel * kColumn + (position / kKernel * kInputs + 4 * group) * 16;
  }
  // The eight bytes that have a weight's position, without a byte beyond the last one.
  static constexpr int byte(int weight) { return std::min(weight / 32 * 8, kPositionBytes - 8); }
};

struct Weights {
  const float* values;
  const uint8_t* positions;
  const float* bias;
  int64_t slices, outputs;
};

template <class F>
struct Sums {
  __m512 total[F::kAtOnce][F::kVectors];
};

template <class F, int kWeight>
SPARSEDM_INLINE void add_weight(const float* panel, const __m512* four, const uint64_t* positions, Sums<F>& sums) {
  constexpr int turn = (2 * kWeight - 8 * F::byte(kWeight) - 6) & 63;  // brings the position to bits 6 and 7: times 64 bytes
#pragma GCC unroll 8
  for (int o = 0; o < F::kAtOnce; ++o) {
    const uint64_t turned = positions[o] >> turn | positions[o] << (-turn & 63);
    const char* row = reinterpret_cast<const char*>(panel + F::group(kWeight)) + (turned & 0xC0);
    const __m512 weight = _mm512_permute_ps(four[o], kWeight % 4 * 0x55);
#pragma GCC unroll 8
    for (int v = 0; v < F::kVectors; ++v)
      sums.total[o][v] = _mm512_fmadd_ps(weight, _mm512_load_ps(row + 4 * F::vector(v)), sums.total[o][v]);
  }
}

// Weights kFirst to kFirst + 3: one load broadcasts all four, shuffles do the rest.
template <class F, int kFirst>
SPARSEDM_INLINE void add_four(const float* panel, const float* values, const uint8_t* bytes, uint64_t* positions, Sums<F>& sums) {
  __m512 four[F::kAtOnce];
#pragma GCC unroll 8
  for (int o = 0; o < F::kAtOnce; ++o) {
    four[o] = _mm512_broadcast_f32x4(_mm_loadu_ps(values + o * F::kWeights + kFirst));
    if (kFirst % 32 == 0) std::memcpy(positions + o, bytes + o * F::kPositionBytes + F::byte(kFirst), 8);
  }
  add_weight<F, kFirst>(panel, four, positions, sums);
  add_weight<F, kFirst + 1>(panel, four, positions, sums);
  add_weight<F, kFirst + 2>(panel, four, positions, sums);
  add_weight<F, kFirst + 3>(panel, four, positions, sums);
}

template <class F, int... kFour>
SPARSEDM_INLINE void add_all(const float* panel, const float* values, const uint8_t* bytes, Sums<F>& sums,
                             std::integer_sequence<int, kFour...>) {
  static_assert(F::group(F::kWeights - 1) + F::vector(F::kVectors - 1) + 4 * 16 == F::kFloats);  // the last group of the panel
  uint64_t positions[F::kAtOnce];
  (add_four<F, 4 * kFour>(panel, values, bytes, positions, sums), ...);
}

// Add a slice's products to the sums [output][F::kWidth] of outputs first..last, a multiple of 8.
template <class F>
SPARSEDM_UNROLLED __attribute__((noinline)) void add_slice(const float* panel, const Weights& w, int64_t slice, int64_t first,
                                                           int64_t last, float* sums) {
  const float* values = w.values + (slice * w.outputs + first) * F::kWeights;
  const uint8_t* positions = w.positions + (slice * w.outputs + first) * F::kPositionBytes;
  for (int64_t o = first; o < last; o += F::kAtOnce, sums += F::kAtOnce * F::kWidth) {
    Sums<F> s;
#pragma GCC unroll 8
    for (int i = 0; i < F::kAtOnce * F::kVectors; ++i) s.total[i / F::kVectors][i % F::kVectors] = _mm512_load_ps(sums + i * 16);
    add_all<F>(panel, values, positions, s, std::make_integer_sequence<int, F::kWeights / 4>());
#pragma GCC unroll 8
    for (int i = 0; i < F::kAtOnce * F::kVectors; ++i) _mm512_store_ps(sums + i * 16, s.total[i / F::kVectors][i % F::kVectors]);
    values += F::kAtOnce * F::kWeights;
    positions += F::kAtOnce * F::kPositionBytes;
  }
}

template <class F>
void start(const Weights& w, int64_t first, int64_t last, float* sums) {
  for (int64_t o = first; o < last; ++o) std::fill_n(sums + (o - first) * F::kWidth, F::kWidth, w.bias ? w.bias[o] : 0.0f);
}

// How many outputs (a multiple of 8, at most kOutputs) go together, so that `tiles` tiles keep all threads busy to the end.
// Every share of a tile's outputs fills the panel anew, which takes about as long as 3 outputs.
int64_t share(int64_t tiles, int64_t outputs) {
  const int64_t threads = omp_get_max_threads();
  int64_t best = 0, best_time = 0;
  for (int64_t n = (outputs + kOutputs - 1) / kOutputs, tries = 0; tries < 2 * threads; ++n, ++tries) {
    const int64_t chunk = ((outputs + n - 1) / n + 7) / 8 * 8, chunks = (outputs + chunk - 1) / chunk;
    const int64_t time = (tiles * chunks + threads - 1) / threads * (chunk + 3);
    if (!best || time < best_time) best = chunk, best_time = time;
  }
  return best;
}

// Calls work(tile, first output, last output, panel, sums, whether the panel was last used for another tile) for all tiles and
// shares of outputs, by all threads.
template <class Work>
int for_all(int64_t tiles, int64_t outputs, int64_t panel_floats, const Work& work) {
  const int64_t chunk = share(tiles, outputs), chunks = (outputs + chunk - 1) / chunk;
  int failed = kDone;
#pragma omp parallel
  {
    float* const sums = workspace<float, 0>(kOutputs * 128);
    float* const panel = sums ? workspace<float, 1>(panel_floats) : nullptr;
    int64_t filled = -1;
    if (!panel) {
#pragma omp atomic write
      failed = kNoMemory;
    }
#pragma omp for collapse(2)
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t c = 0; c < chunks; ++c) {
        if (!panel) continue;
        work(tile, c * chunk, std::min((c + 1) * chunk, outputs), panel, sums, filled != tile);
        filled = tile;
      }
  }
  return failed;
}

struct Maps {
  int64_t images, channels, height, width, outputs, padding, out_height, out_width;
};

// The strips of all pictures' outputs: which one, and its first row and column.
template <class F, int kLanes>
struct Strips {
  static constexpr int kShare = 16 / kLanes, kTile = F::kStrips * kShare;  // strips of a vector, and of a tile
  const Maps& m;
  const int64_t across = (m.out_width + kLanes - 1) / kLanes, down = (m.out_height + F::kRows - 1) / F::kRows;
  const int64_t count = m.images * across * down;

  int64_t tiles() const { return (count + kTile - 1) / kTile; }
  int64_t image(int64_t strip) const { return strip / (across * down); }
  int64_t row(int64_t strip) const { return strip / across % down * F::kRows; }
  int64_t column(int64_t strip) const { return strip % across * kLanes; }
};

// Pixels that the mask names; the others are zero, and are not touched in memory.
template <int kLanes>
inline void load_pixels(const float* from, __mmask16 mask, float* to) {
  if constexpr (kLanes == 16)
    _mm512_store_ps(to, _mm512_maskz_loadu_ps(mask, from));
  else if constexpr (kLanes == 8)
    _mm256_store_ps(to, _mm256_maskz_loadu_ps(mask, from));
  else
    _mm_store_ps(to, _mm_maskz_loadu_ps(mask, from));
}

template <int kLanes>
inline void store_pixels(const float* from, __mmask16 mask, float* to) {
  if constexpr (kLanes == 16)
    _mm512_mask_storeu_ps(to, mask, _mm512_load_ps(from));
  else if constexpr (kLanes == 8)
    _mm256_mask_storeu_ps(to, mask, _mm256_load_ps(from));
  else
    _mm_mask_storeu_ps(to, mask, _mm_load_ps(from));
}

// The lanes of columns column..column + lanes that lie in a map.
__mmask16 within(int64_t column, int64_t lanes, int64_t width) {
  uint32_t mask = 0;
  for (int64_t i = 0; i < lanes; ++i) mask |= static_cast<uint32_t>(column + i >= 0 && column + i < width) << i;
  return mask;
}

// The panel of channels channel..channel + F::kInputs for a tile.
template <class F, int kLanes>
void fill(const Strips<F, kLanes>& strips, const float* x, int64_t channel, int64_t tile, float* panel) {
  const Maps& m = strips.m;
  const int64_t area = m.height * m.width;
  for (int i = 0; i < strips.kTile; ++i) {
    const int64_t strip = tile * strips.kTile + i, column = strips.column(strip) - m.padding;
    const float* const plane = x + (strips.image(strip) * m.channels + channel) * area;
    float* to = panel + i / strips.kShare * F::kStrip + i % strips.kShare * kLanes;
    __mmask16 masks[F::kKernel];
    for (int k = 0; k < F::kKernel; ++k) masks[k] = within(column + k, kLanes, m.width);
    for (int r = 0; r < F::kHigh; ++r, to += F::kInputs * 16) {
      const int64_t row = strips.row(strip) - m.padding + r;
      const bool there = strip < strips.count && row >= 0 && row < m.height;
      const float* from = there ? plane + row * m.width + column : x;
      for (int c = 0; c < F::kInputs; ++c, from += there ? area : 0)
#pragma GCC unroll 3
        for (int k = 0; k < F::kKernel; ++k) load_pixels<kLanes>(from + k, there ? masks[k] : 0, to + c * 16 + k * F::kColumn);
    }
  }
}

template <class F, int kLanes>
void store(const Strips<F, kLanes>& strips, const float* sums, int64_t first, int64_t last, int64_t tile, float* y) {
  const Maps& m = strips.m;
  const int64_t area = m.out_height * m.out_width;
  for (int i = 0; i < strips.kTile; ++i) {
    const int64_t strip = tile * strips.kTile + i, row = strips.row(strip), column = strips.column(strip);
    if (strip >= strips.count) return;
    const __mmask16 mask = within(column, kLanes, m.out_width);
    const int64_t rows = std::min<int64_t>(F::kRows, m.out_height - row);
    const float* from = sums + i / strips.kShare * F::kRows * 16 + i % strips.kShare * kLanes;
    float* to = y + (strips.image(strip) * m.outputs + first) * area + row * m.out_width + column;
    for (int64_t o = first; o < last; ++o, from += F::kWidth, to += area)
      for (int64_t r = 0; r < rows; ++r) store_pixels<kLanes>(from + r * 16, mask, to + r * m.out_width);
  }
}

template <class F, int kLanes>
int convolve(const Maps& m, const Weights& w, const float* x, float* y) {
  const Strips<F, kLanes> strips{m};
  return for_all(strips.tiles(), w.outputs, F::kFloats,
                 [&](int64_t tile, int64_t first, int64_t last, float* panel, float* sums, bool) {
                   start<F>(w, first, last, sums);
                   for (int64_t s = 0; s < w.slices; ++s) {
                     fill(strips, x, s * F::kInputs, tile, panel);
                     add_slice<F>(panel, w, s, first, last, sums);
                   }
                   store(strips, sums, first, last, tile, y);
                 });
}

// Sums are added up in the same order in all forms, so the choice changes no bit.
struct Candidate {
  double time;
  int (*run)(const Maps&, const Weights&, const float*, float*);
};

// `time`: of a vector of the form, where 1 is that of 8 vectors and one output.
template <class F, int kLanes>
Candidate candidate(const Maps& m, double time) {
  return {static_cast<double>(Strips<F, kLanes>{m}.tiles() * F::kVectors) * time, convolve<F, kLanes>};
}

bool faster(const Candidate& a, const Candidate& b) { return a.time < b.time; }

template <int kKept, int kKernel, int kInputs, int kLanes>
Candidate fastest_form(const Maps& m) {
  return std::min({candidate<Form<kKept, kKernel, kInputs, 8, 8, 1>, kLanes>(m, 1.0),
                   candidate<Form<kKept, kKernel, kInputs, 4, 8, 1>, kLanes>(m, 1.05),
                   candidate<Form<kKept, kKernel, kInputs, 4, 4, 2>, kLanes>(m, 1.15),
                   candidate<Form<kKept, kKernel, kInputs, 2, 2, 4>, kLanes>(m, 1.6),
                   candidate<Form<kKept, kKernel, kInputs, 1, 1, 8>, kLanes>(m, 2.4)},
                  faster);
}

template <int kKept, int kKernel, int kInputs>
int fastest(const Maps& m, const Weights& w, const float* x, float* y) {
  return std::min({fastest_form<kKept, kKernel, kInputs, 16>(m), fastest_form<kKept, kKernel, kInputs, 8>(m),
                   fastest_form<kKept, kKernel, kInputs, 4>(m)},
                  faster)
      .run(m, w, x, y);
}

// x [tokens, inputs] to y [tokens, outputs]. The panels of all slices are filled at once, by transposing.
struct Tokens {
  const float* x;
  float* y;
  int64_t inputs;
};

template <int kKept, int kVectors>
void multiply(const Tokens& t, const Weights& w, int64_t token, int64_t count, int64_t first, int64_t last, float* panel,
              float* sums, bool fresh) {
  constexpr int at_once = kVectors == 1 ? 8 : kVectors == 2 ? 4 : kVectors <= 4 ? 2 : 1;
  typedef Form<kKept, 1, kLinearInputs, kVectors, kVectors, at_once> F;
  if (fresh) {
    if (count < F::kWidth) std::fill_n(panel, w.slices * F::kFloats, 0.0f);
    for (int64_t s = 0; s < w.slices; ++s)
      for (int64_t i = 0; i < count; i += 16)
        transpose<uint32_t>(t.x + (token + i) * t.inputs + s * F::kInputs, t.inputs, panel + s * F::kFloats + F::vector(i / 16),
                            16, std::min<int64_t>(16, count - i), F::kInputs);
  }
  float* const y = t.y + token * w.outputs;
  for (int64_t i = 0; i < count; ++i)  // y's lines come to the cache while we compute
    for (int64_t o = first; o < last; o += 16) __builtin_prefetch(y + i * w.outputs + o, 1, 2);
  start<F>(w, first, last, sums);
  for (int64_t s = 0; s < w.slices; ++s) add_slice<F>(panel + s * F::kFloats, w, s, first, last, sums);
  for (int64_t i = 0; i < count; i += 16)  // few tokens at a time: their rows of y lie in different pages
    transpose<uint32_t>(sums + i, F::kWidth, y + i * w.outputs + first, w.outputs, last - first,
                        std::min<int64_t>(16, count - i));
}

// Blocks of tokens differ by at most one vector: 1,028 tokens are 2 blocks of 128 and 7 of 112.
template <int kKept>
int multiply_all(const Tokens& t, const Weights& w, int64_t tokens) {
  typedef decltype(&multiply<kKept, 8>) Multiply;
  static constexpr Multiply by_vectors[] = {multiply<kKept, 1>, multiply<kKept, 2>, multiply<kKept, 3>, multiply<kKept, 4>,
                                            multiply<kKept, 5>, multiply<kKept, 6>, multiply<kKept, 7>, multiply<kKept, 8>};
  const int64_t vectors = (tokens + 15) / 16, blocks = (vectors + 7) / 8, most = (vectors + blocks - 1) / blocks;
  return for_all(blocks, w.outputs, w.slices * kLinearInputs * most * 16,
                 [&](int64_t block, int64_t first, int64_t last, float* panel, float* sums, bool fresh) {
                   const int64_t begin = block * vectors / blocks, end = (block + 1) * vectors / blocks;
                   const int64_t count = std::min(end * 16, tokens) - begin * 16;
                   by_vectors[end - begin - 1](t, w, begin * 16, count, first, last, panel, sums, fresh);
                 });
}

}  // namespace
#endif

// The inputs of a slice for a layer with square kernels (1 for linear layers) and stride 1, or 0 if this form does not take it.
extern "C" int64_t sparsedm_slice([[maybe_unused]] int64_t inputs, [[maybe_unused]] int64_t outputs,
                                  [[maybe_unused]] int64_t kernel, [[maybe_unused]] int64_t kept) {
#ifdef SPARSEDM_SLICES
  if (kept != 2 || inputs < 1 || outputs < 1 || outputs % 8) return 0;
  if (kernel == 1) return inputs % kLinearInputs ? 0 : kLinearInputs;
  if (kernel == 3) return inputs % kNarrowChannels ? 0 : inputs % kWideChannels ? kNarrowChannels : kWideChannels;
#endif
  return 0;
}

// As sparsedm_nm4_linear and sparsedm_nm4_conv2d, in float32 and for weights in slices of sparsedm_slice inputs; kernels are
// square, strides 1.
extern "C" int sparsedm_sliced_linear([[maybe_unused]] const float* x, [[maybe_unused]] const float* values,
                                      [[maybe_unused]] const uint8_t* positions, [[maybe_unused]] const float* bias,
                                      [[maybe_unused]] float* y, int64_t tokens, int64_t inputs, int64_t outputs, int64_t kept) {
  if (!sparsedm_slice(inputs, outputs, 1, kept)) return kNoKernel;
#ifdef SPARSEDM_SLICES
  if (tokens > 0) return multiply_all<2>({x, y, inputs}, {values, positions, bias, inputs / kLinearInputs, outputs}, tokens);
#endif
  return kDone;
}

extern "C" int sparsedm_sliced_conv2d([[maybe_unused]] const float* x, [[maybe_unused]] const float* values,
                                      [[maybe_unused]] const uint8_t* positions, [[maybe_unused]] const float* bias,
                                      [[maybe_unused]] float* y, int64_t images, int64_t channels, int64_t height, int64_t width,
                                      int64_t outputs, int64_t kernel, int64_t padding, int64_t kept) {
  const int64_t slice = sparsedm_slice(channels, outputs, kernel, kept);
  if (!slice || !is_convolution(images, height, width, kernel, kernel, padding)) return kNoKernel;
#ifdef SPARSEDM_SLICES
  if (!images) return kDone;
  const int64_t border = 2 * padding - kernel + 1;
  Maps m = {images, channels, height, width, outputs, padding, height + border, width + border};
  if (kernel == 1 && !padding) {  // the rows of the map lie side by side, and may be cut anywhere
    const int64_t area = height * width;
    m.width = m.out_width = area % 16 ? area % 4 ? area : 4 : 16;
    m.height = m.out_height = area / m.width;
  }
  const auto run = kernel == 1 ? fastest<2, 1, kLinearInputs>
                   : slice == kWideChannels ? fastest<2, 3, kWideChannels> : fastest<2, 3, kNarrowChannels>;
  return run(m, {values, positions, bias, channels / slice, outputs}, x, y);
#endif
  return kDone;
}
