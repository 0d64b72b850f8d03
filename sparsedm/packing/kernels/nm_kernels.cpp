// Linear layers and 2-D convolutions with N:4 sparse weights on the CPU: float32, and bfloat16 where AVX512-BF16 is.
//
// Activations go into panels: the same inputs of up to 128 tokens or output pixels side by side, so that vectors run over
// columns, not over outputs, and the zeros are never loaded. Panels are cut into slices that fit the L1 cache; every output adds
// up the products of a slice before the next one comes. Plain C interface, no torch headers. nm_slices.cpp has a faster form for
// some layers.
//
// Weights are [outputs, inputs / 4 * kept] values and two-bit positions in the same order, rows starting at whole bytes. The
// inputs of a convolution are (kernel row, kernel column, channel), channel fastest.
#include <omp.h>

#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define SPARSEDM_BF16 1
#endif

constexpr int64_t kSlice = 24 * 1024;  // bytes of a panel slice: in every L1 cache, with room for weights and sums
constexpr int64_t kRowOrder = 0, kPairs = -1;  // orders of weights, as in orders.py; others are slices
constexpr double kMostBytes = 1e12;    // of the padded copy of x

typedef float Vec __attribute__((vector_size(kBytes)));
typedef float LooseVec __attribute__((vector_size(kBytes), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

template <class Value>
struct Weights {
  const Value* values;
  const uint8_t* positions;
  const float* bias;
  int64_t inputs, outputs;
  int64_t order, spots;  // kRows, kPairs, or the inputs of a slice for each of the kernel's positions
};

// float32. A panel row is one input; a kept weight is broadcast and multiplied with the row that its position names. Bound by
// the loads of the L1 cache: one for each multiply-add, and one for each broadcast.
template <int kKept, int kVectors>
struct Float {
  typedef float Value;
  typedef float Element;
  static constexpr int kRowInputs = 1, kStep = 1;
  static constexpr int64_t kWidth = kVectors * kLanes;
  static constexpr int64_t kRows = kSlice / (kWidth * 4) / 16 * 16;  // panel rows of a slice; 16 inputs have whole position bytes

  explicit Float(const Weights<float>& weights) : w(weights) {}
  bool ready() const { return true; }

  void start(int64_t first, int64_t last, float* sums) const {
    for (int64_t o = first; o < last; ++o) std::fill_n(sums + (o - first) * kWidth, kWidth, w.bias ? w.bias[o] : 0.0f);
  }

  // Add the products of panel rows row..row + count to the sums of outputs first..last.
  void add(const float* panel, int64_t row, int64_t count, int64_t first, int64_t last, float* sums) const {
    const int64_t stride = w.inputs / 4 * kKept, offset = row / 4 * kKept;
    for (int64_t o = first; o < last; ++o, sums += kWidth) {
      const float* values = w.values + o * stride + offset;
      const uint8_t* positions = w.positions + (o * stride + offset) / 4;
      __builtin_prefetch(values + 2 * stride);
      __builtin_prefetch(values + 2 * stride + 16);
      Vec total[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[v] = load(sums + v * kLanes);
      const float* rows = panel;
      int64_t i = 0;
      for (; i + 16 <= count; i += 16, rows += 16 * kWidth, values += 4 * kKept, positions += kKept)
        add_groups<4>(rows, values, positions, total);
      for (; i + 8 <= count && kKept == 2; i += 8, rows += 8 * kWidth, values += 4, positions += 1)
        add_groups<2>(rows, values, positions, total);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, total[v]);
    }
  }

  template <int kGroups>
  static inline void add_groups(const float* rows, const float* values, const uint8_t* positions, Vec* total) {
    uint32_t code = 0;
    std::memcpy(&code, positions, kGroups * kKept / 4);
#pragma GCC unroll 12
    for (int k = 0; k < kGroups * kKept; ++k) {
      const float* row = rows + (k / kKept * 4 + ((code >> (2 * k)) & 3)) * kWidth;  // at most 3: never outside the group
      const Vec value = values[k] - Vec{};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[v] += value * load(row + v * kLanes);
    }
  }

  static void fill(const float* x, int64_t inputs, int64_t tokens, float* panel) {
    transpose<uint32_t>(x, inputs, panel, kWidth, tokens, inputs);
  }
  static void spread(const float* x, int64_t, float* plane, int64_t width) { std::copy_n(x, width, plane); }

  // The sums of outputs first..last to rows of y: those of `tokens` tokens, or of pixels column..column + count.
  void store_tokens(float* sums, float* y, int64_t first, int64_t last, int64_t tokens) const {
    for (int64_t t = 0; t < tokens; t += kLanes)  // few tokens at a time: their rows of y lie in different pages
      transpose<uint32_t>(sums + t, kWidth, y + t * w.outputs + first, w.outputs, last - first,
                          std::min<int64_t>(kLanes, tokens - t));
  }
  void store_pixels(const float* sums, float* y, int64_t area, int64_t first, int64_t last, int64_t column, int64_t count) const {
    for (int64_t o = first; o < last; ++o) std::copy_n(sums + (o - first) * kWidth + column, count, y + o * area);
  }

  const Weights<float> w;
};

#ifdef SPARSEDM_BF16
// Byte shuffles that bring, of two tokens' four inputs, the kept pairs of two outputs to the front; by both outputs' positions.
struct Shuffles {
  alignas(64) uint64_t control[256];
  constexpr Shuffles() : control() {
    for (int code = 0; code < 256; ++code)
      for (int k = 0; k < 4; ++k) {
        const uint64_t position = (code >> (2 * k)) & 3;
        control[code] |= ((2 * position) | (2 * position + 1) << 8) << (16 * k);
      }
  }
};
static constexpr Shuffles kShuffles;

// bfloat16, two of four kept. A panel row is a group of four inputs, eight bytes a token; a vector holds eight tokens and makes
// sums of two outputs: one shuffle selects the kept pairs of both, one dot product multiplies and adds them, in float32. Sums lie
// [pair of outputs][token][2].
template <int kVectors>
struct Bfloat {
  typedef uint16_t Value;
  typedef uint64_t Element;
  typedef uint64_t Word __attribute__((aligned(2), may_alias));
  static constexpr int kRowInputs = 4, kStep = 2, kTile = 5;  // pairs of outputs at a time: as many sums as registers hold
  static constexpr int64_t kWidth = kVectors * 8;
  static constexpr int64_t kRows = kSlice / (kWidth * 8);

  explicit Bfloat(const Weights<uint16_t>& weights) : w(weights), groups(w.inputs / 4) {
    if (w.order == kPairs) {
      values = reinterpret_cast<const Word*>(w.values), codes = w.positions;
      return;
    }
    uint64_t* const value = workspace<uint64_t, 0>(w.outputs / 2 * groups);
    uint8_t* const code = workspace<uint8_t, 1>(w.outputs / 2 * groups);
    values = reinterpret_cast<const Word*>(value), codes = code;
    if (!ready()) return;
#pragma omp parallel for
    for (int64_t pair = 0; pair < w.outputs / 2; ++pair) make_pair(pair, value + pair * groups, code + pair * groups);
  }
  bool ready() const { return values && codes; }

  // Values and positions of outputs 2 * pair and 2 * pair + 1, from rows (one slice) or slices.
  void make_pair(int64_t pair, uint64_t* value, uint8_t* code) const {
    typedef uint32_t Kept __attribute__((aligned(2), may_alias));  // both kept weights of a group
    const Kept* const kept = reinterpret_cast<const Kept*>(w.values);
    const int64_t spots = w.order == kRowOrder ? 1 : w.spots, slice = w.order == kRowOrder ? groups : w.order / 4;
    for (int64_t spot = 0; spot < spots; ++spot)
      for (int64_t s = 0; s < groups / spots / slice; ++s, value += slice, code += slice) {
        const int64_t at = ((s * w.outputs + 2 * pair) * spots + spot) * slice, other = at + spots * slice;
        for (int64_t g = 0; g < slice; ++g) value[g] = kept[at + g] | static_cast<uint64_t>(kept[other + g]) << 32;
        for (int64_t g = 0; g < slice; g += 2) {
          const uint8_t one = w.positions[(at + g) / 2], two = w.positions[(other + g) / 2];
          code[g] = (one & 15) | (two & 15) << 4;
          code[g + 1] = one >> 4 | (two & 240);
        }
      }
  }

  void start(int64_t first, int64_t last, float* sums) const {
    for (int64_t o = first; o < last; o += 2, sums += 2 * kWidth)
      for (int64_t i = 0; i < kWidth; ++i) {
        sums[2 * i] = w.bias ? w.bias[o] : 0.0f;
        sums[2 * i + 1] = w.bias ? w.bias[o + 1] : 0.0f;
      }
  }

  void add(const uint64_t* panel, int64_t row, int64_t count, int64_t first, int64_t last, float* sums) const {
    int64_t pair = first / 2;
    for (; pair + kTile <= last / 2; pair += kTile, sums += kTile * 2 * kWidth) add_tile<kTile>(panel, row, count, pair, sums);
    switch (last / 2 - pair) {
      case 4: return add_tile<4>(panel, row, count, pair, sums);
      case 3: return add_tile<3>(panel, row, count, pair, sums);
      case 2: return add_tile<2>(panel, row, count, pair, sums);
      case 1: return add_tile<1>(panel, row, count, pair, sums);
    }
  }

  template <int kPairs>
  void add_tile(const uint64_t* panel, int64_t row, int64_t count, int64_t pair, float* sums) const {
    const __m512i second_token = _mm512_set4_epi64(0x0808080808080808, 0, 0x0808080808080808, 0);
    const Word* value = values + pair * groups + row;
    const uint8_t* code = codes + pair * groups + row;
    __m512 total[kPairs][kVectors];
#pragma GCC unroll 20
    for (int i = 0; i < kPairs * kVectors; ++i) total[i / kVectors][i % kVectors] = _mm512_loadu_ps(sums + i * 16);
#pragma GCC unroll 1
    for (int64_t g = 0; g < count; ++g, panel += kWidth) {
      __m512i x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) x[v] = _mm512_loadu_si512(panel + v * 8);
#pragma GCC unroll 5
      for (int p = 0; p < kPairs; ++p) {
        const __m512i shuffle = _mm512_or_si512(_mm512_set1_epi64(kShuffles.control[code[p * groups + g]]), second_token);
        const __m512bh weight = (__m512bh)_mm512_set1_epi64(value[p * groups + g]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          total[p][v] = _mm512_dpbf16_ps(total[p][v], (__m512bh)_mm512_shuffle_epi8(x[v], shuffle), weight);
      }
    }
#pragma GCC unroll 20
    for (int i = 0; i < kPairs * kVectors; ++i) _mm512_storeu_ps(sums + i * 16, total[i / kVectors][i % kVectors]);
  }

  static void fill(const uint16_t* x, int64_t inputs, int64_t tokens, uint64_t* panel) {
    transpose<uint64_t>(x, inputs / 4, panel, kWidth, tokens, inputs / 4);
  }
  static void spread(const uint16_t* x, int64_t channel, uint64_t* plane, int64_t width) {
    const uint16_t *a = x, *b = a + channel, *c = b + channel, *d = c + channel;
    for (int64_t i = 0; i < width; ++i)
      plane[i] = a[i] | static_cast<uint64_t>(b[i]) << 16 | static_cast<uint64_t>(c[i]) << 32 | static_cast<uint64_t>(d[i]) << 48;
  }

  // Round the sums of a pair of outputs to bfloat16, in place: words of both outputs, a token each.
  static uint32_t* round_pair(float* sums) {
    for (int i = 0; i < kVectors; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i * 8), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + i * 16)));
    return reinterpret_cast<uint32_t*>(sums);
  }
  void store_tokens(float* sums, uint16_t* y, int64_t first, int64_t last, int64_t tokens) const {
    for (int64_t o = first; o < last; o += 2) round_pair(sums + (o - first) * kWidth);
    for (int64_t t = 0; t < tokens; t += 16)
      transpose<uint32_t>(sums + t, 2 * kWidth, y + t * w.outputs + first, w.outputs / 2, (last - first) / 2,
                          std::min<int64_t>(16, tokens - t));
  }
  void store_pixels(const float* sums, uint16_t* y, int64_t area, int64_t first, int64_t last, int64_t column,
                    int64_t count) const {
    for (int64_t o = first; o < last; o += 2) {
      float rounded[2 * kWidth];
      std::memcpy(rounded, sums + (o - first) * kWidth, sizeof(rounded));
      const uint32_t* words = round_pair(rounded) + column;
      for (int64_t i = 0; i < count; ++i) y[o * area + i] = words[i];
      for (int64_t i = 0; i < count; ++i) y[(o + 1) * area + i] = words[i] >> 16;
    }
  }

  const Weights<uint16_t> w;
  const int64_t groups;
  const Word* values;    // of both outputs of a pair, [pair][group]
  const uint8_t* codes;  // and their positions
};
#endif

template <class Value>
struct Linear {
  Weights<Value> w;
  const Value* x;  // [tokens, inputs]
  Value* y;        // [tokens, outputs]
  int64_t tokens;

  int64_t columns() const { return tokens; }

  template <class Kernel>
  int run() const {
    typedef typename Kernel::Element Element;
    constexpr int64_t width = Kernel::kWidth, slice = Kernel::kRows;
    const int64_t rows = w.inputs / Kernel::kRowInputs, blocks = (tokens + width - 1) / width;
    const int64_t chunks = (w.outputs + kOutputs - 1) / kOutputs;
    const Kernel kernel(w);
    if (!kernel.ready()) return kNoMemory;
    int failed = kDone;
#pragma omp parallel
    {
      float* const sums = workspace<float, 4>(kOutputs * width);
      Element* const panel = sums ? workspace<Element, 2>(rows * width) : nullptr;
      int64_t filled = -1;
      if (!panel) {
#pragma omp atomic write
        failed = kNoMemory;
      }
#pragma omp for collapse(2)
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t c = 0; c < chunks; ++c) {
          if (!panel) continue;
          const int64_t first = c * kOutputs, last = std::min(first + kOutputs, w.outputs);
          const int64_t count = std::min(width, tokens - b * width);
          if (filled != b) {
            if (count < width) std::memset(panel, 0, rows * width * sizeof(Element));
            Kernel::fill(x + b * width * w.inputs, w.inputs, count, panel);
            filled = b;
          }
          Value* to = y + b * width * w.outputs;
          for (int64_t t = 0; t < count; ++t)  // y's lines come to the cache while we compute
            for (int64_t o = first; o < last; o += 64 / sizeof(Value)) __builtin_prefetch(to + t * w.outputs + o, 1, 2);
          kernel.start(first, last, sums);
          for (int64_t r = 0; r < rows; r += slice)
            kernel.add(panel + r * width, r, std::min(slice, rows - r), first, last, sums);
          kernel.store_tokens(sums, to, first, last, count);
        }
    }
    return failed;
  }
};

// x [images, channels, height, width] to y [images, outputs, out height, out width].
struct Shape {
  int64_t images, channels, height, width, kernel_h, kernel_w, stride, padding;

  int64_t out_height() const { return (height + 2 * padding - kernel_h) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - kernel_w) / stride + 1; }
  // A padded row holds its columns by their remainder modulo the stride, so that a kernel position reads neighbours.
  int64_t phase() const { return (width + 2 * padding + stride - 1) / stride; }
  int64_t row() const { return phase() * stride; }
  int64_t place(int64_t column) const { return column % stride * phase() + column / stride; }
  int64_t plane() const { return (height + 2 * padding) * row(); }

  bool valid() const {
    if (channels < 4 || channels % 4 || stride < 1 || stride > kLargest) return false;
    return is_convolution(images, height, width, kernel_h, kernel_w, padding);
  }
  double bytes() const { return 4.0 * images * channels * plane(); }
};

// Copies of x's planes with zeros around them, in the panel's elements.
template <class Kernel>
static void pad(const Shape& s, const typename Kernel::Value* x, typename Kernel::Element* planes) {
  typedef typename Kernel::Element Element;
  const int64_t count = s.images * s.channels / Kernel::kRowInputs, area = s.height * s.width;
#pragma omp parallel for
  for (int64_t p = 0; p < count; ++p) {
    const typename Kernel::Value* from = x + p * Kernel::kRowInputs * area;
    Element* plane = planes + p * s.plane();
    std::memset(plane, 0, s.plane() * sizeof(Element));
    for (int64_t r = 0; r < s.height; ++r) {
      Element* row = plane + (r + s.padding) * s.row();
      if (s.stride == 1) {
        Kernel::spread(from + r * s.width, area, row + s.padding, s.width);
        continue;
      }
      for (int64_t remainder = 0; remainder < s.stride; ++remainder) {
        const int64_t at = (s.padding - remainder + s.stride - 1) / s.stride;
        Element* to = row + remainder * s.phase() + at;
        for (int64_t c = at * s.stride + remainder - s.padding; c < s.width; c += s.stride)
          Kernel::spread(from + r * s.width + c, area, to++, 1);
      }
    }
  }
}

// Output pixels side by side in one row of an image: where they go in the panel, and where they come from in the planes.
struct Run {
  int64_t to, from, count;
};

static int find_runs(const Shape& s, int64_t planes_per_image, int64_t pixel, int64_t pixels, Run* runs) {
  const int64_t oh = s.out_height(), ow = s.out_width();
  int count = 0;
  for (int64_t done = 0; done < pixels; done += runs[count++].count) {
    const int64_t at = pixel + done, image = at / (oh * ow), row = at / ow % oh, column = at % ow;
    const int64_t from = image * planes_per_image * s.plane() + row * s.stride * s.row() + column;
    runs[count] = {done, from, std::min(ow - column, pixels - done)};
  }
  return count;
}

// Cut runs into pieces of one length, a power of two that none is shorter than. A run's last piece may overlap the one before.
static int cut(const Run* runs, int number, int64_t longest, int64_t* length, Run* pieces) {
  *length = longest;
  for (int i = 0; i < number; ++i)
    while (runs[i].count < *length) *length /= 2;
  int count = 0;
  for (const Run* run = runs; run < runs + number; ++run)
    for (int64_t i = 0; i < run->count; i += *length) {
      const int64_t at = std::min(i, run->count - *length);
      pieces[count++] = {run->to + at, run->from + at, *length};
    }
  return count;
}

template <int64_t kLength, class Element>
static inline void copy_pieces(const Element* from, const Run* pieces, int number, Element* to) {
  typedef char Piece __attribute__((vector_size(kLength * sizeof(Element)), aligned(4), may_alias));
  for (const Run* piece = pieces; piece < pieces + number; ++piece)
    *reinterpret_cast<Piece*>(to + piece->to) = *reinterpret_cast<const Piece*>(from + piece->from);
}

// Panel rows row..row + count: the planes moved to each kernel position.
template <class Element>
static void fill(const Shape& s, const Element* planes, int64_t per_image, int64_t row, int64_t count, const Run* pieces,
                 int number, int64_t length, int64_t width, Element* panel) {
  constexpr int64_t most = kBytes / sizeof(Element);
  int64_t position = row / per_image, plane = row % per_image;
  for (int64_t r = 0; r < count; ++r, panel += width) {
    const Element* from = planes + plane * s.plane() + position / s.kernel_w * s.row() + s.place(position % s.kernel_w);
    if (length == most)
      copy_pieces<most>(from, pieces, number, panel);
    else if (length * 2 == most)
      copy_pieces<most / 2>(from, pieces, number, panel);
    else
      for (const Run* piece = pieces; piece < pieces + number; ++piece)
        std::copy_n(from + piece->from, length, panel + piece->to);
    if (++plane == per_image) plane = 0, ++position;
  }
}

template <class Value>
struct Convolution {
  Weights<Value> w;
  const Value* x;
  Value* y;
  Shape s;

  int64_t columns() const { return s.images * s.out_height() * s.out_width(); }

  template <class Kernel>
  int run() const {
    typedef typename Kernel::Element Element;
    constexpr int64_t width = Kernel::kWidth, slice = Kernel::kRows;
    const int64_t area = s.out_height() * s.out_width(), total = s.images * area, blocks = (total + width - 1) / width;
    const int64_t rows = w.inputs / Kernel::kRowInputs, per_image = s.channels / Kernel::kRowInputs;
    // Few pixels, as in the innermost levels of a UNet: share out the outputs as well.
    const int64_t shares =
        std::max<int64_t>((w.outputs + kOutputs - 1) / kOutputs, (omp_get_max_threads() + blocks - 1) / blocks);
    const int64_t chunk = ((w.outputs + shares - 1) / shares + 7) / 8 * 8;  // at most kOutputs, which 8 divides
    const int64_t chunks = (w.outputs + chunk - 1) / chunk;
    const Kernel kernel(w);
    Element* const planes = workspace<Element, 3>(s.images * per_image * s.plane());
    if (!kernel.ready() || !planes) return kNoMemory;
    pad<Kernel>(s, x, planes);
    int failed = kDone;
#pragma omp parallel
    {
      float* const sums = workspace<float, 4>(kOutputs * width);
      Element* const panel = sums ? workspace<Element, 5>(slice * width) : nullptr;
      Run runs[width], pieces[2 * width];
      int64_t length;
      if (panel) {
        std::fill_n(panel, slice * width, Element());  // columns beyond the last pixel are computed, too, and denormals are slow
      } else {
#pragma omp atomic write
        failed = kNoMemory;
      }
#pragma omp for collapse(2)
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t c = 0; c < chunks; ++c) {
          if (!panel) continue;
          const int64_t first = c * chunk, last = std::min(first + chunk, w.outputs);
          const int64_t pixel = b * width, pixels = std::min(width, total - pixel);
          const int number =
              cut(runs, find_runs(s, per_image, pixel, pixels, runs), kBytes / sizeof(Element), &length, pieces);
          kernel.start(first, last, sums);
          for (int64_t r = 0; r < rows; r += slice) {
            const int64_t count = std::min(slice, rows - r);
            fill(s, planes, per_image, r, count, pieces, number, length, width, panel);
            kernel.add(panel, r, count, first, last, sums);
          }
          for (int64_t done = 0; done < pixels;) {  // the pixels of one image lie side by side
            const int64_t image = (pixel + done) / area, at = (pixel + done) % area, count = std::min(area - at, pixels - done);
            kernel.store_pixels(sums, y + image * w.outputs * area + at, area, first, last, done, count);
            done += count;
          }
        }
    }
    return failed;
  }
};

// As many vectors of columns a block as fill whole blocks evenly: 264 tokens are three blocks of 96, not two of 128 and one of 8.
static int64_t vectors(int64_t columns, int64_t lanes, int64_t most) {
  const int64_t blocks = (columns + most * lanes - 1) / (most * lanes);
  return ((columns + blocks - 1) / blocks + lanes - 1) / lanes;
}

template <int kKept, class Layer>
static int with_width(const Layer& layer) {
  switch (vectors(layer.columns(), kLanes, 8)) {
    case 1: return layer.template run<Float<kKept, 1>>();
    case 2: return layer.template run<Float<kKept, 2>>();
    case 3: return layer.template run<Float<kKept, 3>>();
    case 4: return layer.template run<Float<kKept, 4>>();
    case 5: return layer.template run<Float<kKept, 5>>();
    case 6: return layer.template run<Float<kKept, 6>>();
    case 7: return layer.template run<Float<kKept, 7>>();
    default: return layer.template run<Float<kKept, 8>>();
  }
}

// Positions of a row of weights must begin at a whole byte, and a slice of 16 inputs too.
template <template <class> class Layer>
static int dispatch(const Layer<float>& layer, int64_t kept) {
  if (layer.w.order != kRowOrder || kept < 1 || kept > 3 || layer.w.inputs < 4 || layer.w.inputs % 4 || layer.w.inputs * kept % 16) return kNoKernel;
  if (layer.columns() < 1 || layer.w.outputs < 1) return kDone;
  switch (kept) {
    case 1: return with_width<1>(layer);
    case 2: return with_width<2>(layer);
    default: return with_width<3>(layer);
  }
}

template <template <class> class Layer>
static int dispatch([[maybe_unused]] const Layer<uint16_t>& layer, [[maybe_unused]] int64_t kept) {
#ifdef SPARSEDM_BF16
  if (kept != 2 || layer.w.inputs < 8 || layer.w.inputs % 8 || layer.w.outputs % 2) return kNoKernel;
  if (layer.columns() < 1 || layer.w.outputs < 1) return kDone;
  switch (vectors(layer.columns(), 8, 4)) {
    case 1: return layer.template run<Bfloat<1>>();
    case 2: return layer.template run<Bfloat<2>>();
    case 3: return layer.template run<Bfloat<3>>();
    default: return layer.template run<Bfloat<4>>();
  }
#else
  return kNoKernel;
#endif
}

// Whether sizes and order fit.
static bool in_order(int64_t order, int64_t channels) {
  return order == kRowOrder || order == kPairs || (order > 0 && order % 8 == 0 && channels % order == 0);
}

// The C interface: x, values and y are float32, or bfloat16 with `bfloat`; bias is float32 or null; all contiguous.
extern "C" int sparsedm_has_bfloat() {
#ifdef SPARSEDM_BF16
  return 1;
#else
  return 0;
#endif
}

template <class Value>
static int linear(const void* x, const void* values, const uint8_t* positions, const float* bias, void* y, int64_t tokens,
                  int64_t inputs, int64_t outputs, int64_t kept, int64_t order) {
  if (!in_order(order, inputs)) return kNoKernel;
  const Weights<Value> w = {static_cast<const Value*>(values), positions, bias, inputs, outputs, order, 1};
  return dispatch(Linear<Value>{w, static_cast<const Value*>(x), static_cast<Value*>(y), tokens}, kept);
}

extern "C" int sparsedm_nm4_linear(const void* x, const void* values, const uint8_t* positions, const float* bias, void* y,
                                   int64_t bfloat, int64_t tokens, int64_t inputs, int64_t outputs, int64_t kept,
                                   int64_t order) {
  return (bfloat ? linear<uint16_t> : linear<float>)(x, values, positions, bias, y, tokens, inputs, outputs, kept, order);
}

template <class Value>
static int convolution(const void* x, const void* values, const uint8_t* positions, const float* bias, void* y, const Shape& s,
                       int64_t outputs, int64_t kept, int64_t order) {
  if (!in_order(order, s.channels)) return kNoKernel;
  const int64_t spots = s.kernel_h * s.kernel_w;
  const Weights<Value> w = {static_cast<const Value*>(values), positions, bias, s.channels * spots, outputs, order, spots};
  return dispatch(Convolution<Value>{w, static_cast<const Value*>(x), static_cast<Value*>(y), s}, kept);
}

extern "C" int sparsedm_nm4_conv2d(const void* x, const void* values, const uint8_t* positions, const float* bias, void* y,
                                   int64_t bfloat, int64_t images, int64_t channels, int64_t height, int64_t width,
                                   int64_t outputs, int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
                                   int64_t kept, int64_t order) {
  Shape s = {images, channels, height, width, kernel_h, kernel_w, stride, padding};
  if (!s.valid()) return kNoKernel;
  s.stride = std::min(stride, std::max(height, width) + 2 * padding);  // beyond the picture all strides read the same
  if (s.bytes() > kMostBytes) return kNoKernel;
  return (bfloat ? convolution<uint16_t> : convolution<float>)(x, values, positions, bias, y, s, outputs, kept, order);
}
