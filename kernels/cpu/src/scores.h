// Scores of the blocks of one sequence and KV head, from its summary. One class, for the operators that keep the
// scores and those that only rank them.
#pragma once

#include <bit>
#include <vector>

#include "ops.h"

namespace agentctx {

enum class Kind { minmax, mean, submeans, codes, manhattan };  // the order of cpu/scores.py
enum class Group { max, mean, sum };

constexpr int64_t ROWS = 4;       // queries that share one pass over a piece of the summary
constexpr int64_t TOGETHER = 4;   // rows of a minmax summary that are read together
constexpr int64_t PIECE = 512;    // blocks that are scored together: their sums stay in the nearest cache
constexpr float THRESHOLD = 0.98f;
constexpr float INNER = 0.4528f, OUTER = 1.510f;  // means of a unit Gaussian in (0, 0.98) and beyond

// NaN wins, as in torch.
inline vf nan_max(vf a, vf b) { return select((a > b) | (a != a), a, b); }
inline float nan_max(float a, float b) { return a > b || a != a ? a : b; }

// In place, orthonormal, in Sylvester's order; n a power of two.
inline void hadamard_row(float* x, int64_t n) {
  for (int64_t step = 1; step < n; step *= 2)
    for (int64_t i = 0; i < n; i += 2 * step)
      for (int64_t j = i; j < i + step; ++j) {
        const float a = x[j], b = x[j + step];
        x[j] = a + b, x[j + step] = a - b;
      }
  const float norm = 1.f / std::sqrt(float(n));
  for (int64_t i = 0; i < n; ++i) x[i] *= norm;
}

class Scorer {
 public:
  Scorer(const at::Tensor& q, const at::Tensor& data, const std::optional<at::Tensor>& thresholds, int64_t kind,
         int64_t page, int64_t group, double scale)
      : q_(q), data_((const char*)data.const_data_ptr()), kind_(Kind(kind)), group_(Group(group)), page_(page),
        rows_(q.size(2)), size_(q.size(3)), group_size_(q.size(1) / data.size(1)),
        batch_stride_(data.stride(0) * data.element_size()), head_stride_(data.stride(1) * data.element_size()),
        stride_(data.stride(2)), scale_(float(scale)), narrow_(data.scalar_type() == at::kBFloat16) {
    if (thresholds) thresholds_ = thresholds->const_data_ptr<float>(), threshold_stride_ = thresholds->stride(0);
    step_ = kind_ == Kind::submeans ? 16 : kind_ >= Kind::codes ? 1 : page;
    capacity_ = kind_ == Kind::minmax ? data.size(3) : data.size(2) * step_ / page;
    bytes_ = size_ / 4;
    width_ = std::max<int64_t>(LANES, bytes_);
    words_ = (bytes_ + 7) / 8;
  }

  int64_t capacity() const { return capacity_; }
  int64_t group_size() const { return group_size_; }

  // The blocks of `tokens`, refused if the summary does not hold them.
  int64_t blocks_of(int64_t tokens) const {
    TORCH_CHECK_INDEX(tokens >= 0 && tokens <= capacity_ * page_, "context_lens has ", tokens,
                      ": the summary holds ", capacity_ * page_, " tokens");
    return (tokens + page_ - 1) / page_;
  }

  // Blocks [begin, end) of head h of sequence b, begin a multiple of 16. Row (g, t) goes to
  // out[g * head_stride + t * capacity]; head_stride 0 unites the g. limits[t]: row t sees no token from there on.
  void run(int64_t b, int64_t h, int64_t begin, int64_t end, const std::vector<int64_t>& limits, float* out,
           int64_t head_stride) {
    out_ = out, out_head_ = head_stride, limits_ = limits.data();
    int64_t seen = 0;
    for (int64_t limit : limits) seen = std::max(seen, limit);
    const int64_t last = std::min(end, (seen + page_ - 1) / page_);
    const char* data = data_ + b * batch_stride_ + h * head_stride_;
    if (begin < last) {
      queries(b, h);
      const int64_t total = rows_ * group_size_;
      if (kind_ == Kind::minmax)
        bounds((const float*)data, begin, last, total);
      else
        for (int64_t block = begin; block < last; ++block)
          for (int64_t row = 0; row < total; row += ROWS) switch (std::min(ROWS, total - row)) {
              case 1: entries<1>(data, block, row, seen); break;
              case 2: entries<2>(data, block, row, seen); break;
              case 3: entries<3>(data, block, row, seen); break;
              default: entries<4>(data, block, row, seen);
            }
    }
    for (int64_t g = 0; g < (head_stride ? group_size_ : 1); ++g)
      for (int64_t t = 0; t < rows_; ++t) {
        const int64_t own = std::max<int64_t>(0, (limits[t] + page_ - 1) / page_);
        float* row = out + g * head_stride + t * capacity_;
        for (int64_t i = std::max(begin, own); i < end; ++i) row[i] = NEG_INF;
      }
  }

 private:
  // Query rows of (b, h) as the kind needs them, t-major: row t * G + g.
  void queries(int64_t b, int64_t h) {
    const int64_t total = rows_ * group_size_;
    const int64_t wide = kind_ >= Kind::codes ? 4 * width_ : size_;
    x_.assign(total * wide, 0.f);
    if (kind_ == Kind::manhattan) own_.assign(total * 2 * words_, 0);
    std::vector<float> rotated(size_);
    for (int64_t t = 0; t < rows_; ++t)
      for (int64_t g = 0; g < group_size_; ++g) {
        const int64_t row = t * group_size_ + g;
        const int64_t at = b * q_.stride(0) + (h * group_size_ + g) * q_.stride(1) + t * q_.stride(2);
        float* x = kind_ >= Kind::codes ? rotated.data() : &x_[row * wide];
        if (q_.scalar_type() == at::kBFloat16)
          for (int64_t d = 0; d < size_; ++d) x[d] = widen(((const bf16*)q_.const_data_ptr())[at + d]);
        else
          std::memcpy(x, (const float*)q_.const_data_ptr() + at, sizeof(float) * size_);
        if (kind_ == Kind::manhattan) {
          codes_of(x, &own_[row * 2 * words_]);
        } else if (kind_ == Kind::codes) {
          hadamard_row(x, size_);
          const float unit = scale_ * (thresholds_[h * threshold_stride_] / THRESHOLD);
          for (int64_t d = 0; d < size_; ++d) x_[row * wide + d / bytes_ * width_ + d % bytes_] = x[d] * unit;
        } else {
          for (int64_t d = 0; d < size_; ++d) x[d] *= scale_;
        }
      }
  }

  // A query as codes, cut at its own root mean square, in the planes of `planes`.
  void codes_of(float* x, uint64_t* to) {
    float squares = 0;
    for (int64_t d = 0; d < size_; ++d) squares += x[d] * x[d];
    const float t = THRESHOLD * std::sqrt(squares / float(size_));
    hadamard_row(x, size_);
    std::vector<uint8_t> packed(words_ * 8);
    for (int64_t d = 0; d < size_; ++d)
      packed[d % bytes_] |= uint8_t(((x[d] > -t) + (x[d] > 0) + (x[d] > t)) << (2 * (d / bytes_)));
    for (int64_t w = 0; w < words_; ++w) planes(&packed[8 * w], 8, to + 2 * w);
  }

  // Thermometer code of 32 codes: with high bit H and low bit L, the bits H | L, H & L, and H. The L1 distance of two
  // codes is the number of bits in which theirs differ.
  static void planes(const uint8_t* bytes, int64_t n, uint64_t* to) {
    constexpr uint64_t low = 0x5555555555555555u;
    uint64_t word = 0;
    std::memcpy(&word, bytes, n);
    const uint64_t l = word & low, h = (word >> 1) & low;
    to[0] = (h | l) | ((h & l) << 1);
    to[1] = h;
  }

  // One block score of row `row`, united with those of its group so far.
  template <class V>
  void put(int64_t row, int64_t block, V s) {
    const int64_t t = row / group_size_, g = row % group_size_;
    float* at = out_ + g * out_head_ + t * capacity_ + block;
    if (!out_head_ && g) {
      V before;
      std::memcpy(&before, at, sizeof(V));
      s = group_ == Group::max ? nan_max(s, before) : s + before;
    }
    if (!out_head_ && group_ == Group::mean && g == group_size_ - 1) s = s * (1.f / float(group_size_));
    std::memcpy(at, &s, sizeof(V));
  }

  // minmax. A negative channel of a query meets the minimum, any other (NaN as well) the maximum, so half of the
  // products are with 0; rows of the summary that all queries of a pass multiply by 0 are not read.
  void bounds(const float* data, int64_t begin, int64_t end, int64_t total) {
    const int64_t groups = (total + ROWS - 1) / ROWS, none = 2 * size_, room = none + 2 * TOGETHER;
    picks_.resize(groups * room);
    weights_.assign(total * (none + 1), 0.f);
    n_.resize(groups);
    std::vector<float> used(none);
    for (int64_t group = 0; group < groups; ++group) {
      std::fill(used.begin(), used.end(), 0.f);
      for (int64_t row = group * ROWS; row < std::min((group + 1) * ROWS, total); ++row) {
        const float* x = &x_[row * size_];
        float *high = &weights_[row * (none + 1)], *low = high + size_;
        for (int64_t d = 0; d < size_; ++d) {
          high[d] = x[d] < 0 ? 0.f : x[d];
          low[d] = x[d] < 0 ? x[d] : 0.f;
        }
        for (int64_t d = 0; d < none; ++d) used[d] += std::fabs(high[d]);
      }
      int32_t* pick = &picks_[group * room];
      int64_t n = 0;
      for (int64_t d = 0; d < none; ++d) {
        pick[n] = int32_t(d);
        n += used[d] != 0.f;
      }
      n_[group] = (n + TOGETHER - 1) / TOGETHER * TOGETHER;
      for (int64_t i = n; i < n_[group] + TOGETHER; ++i) pick[i] = int32_t(none);
    }
    for (int64_t column = begin; column < end; column += PIECE) {
      const int64_t vectors = (std::min(PIECE, end - column) + LANES - 1) / LANES;
      for (int64_t group = 0; group < groups; ++group) {
        const int32_t* pick = &picks_[group * room];
        const float* weight = &weights_[group * ROWS * (none + 1)];
        switch (std::min(ROWS, total - group * ROWS)) {
          case 1: dots<1>(data + column, pick, weight, n_[group], vectors); break;
          case 2: dots<2>(data + column, pick, weight, n_[group], vectors); break;
          case 3: dots<3>(data + column, pick, weight, n_[group], vectors); break;
          default: dots<4>(data + column, pick, weight, n_[group], vectors);
        }
        for (int64_t r = 0; r < std::min(ROWS, total - group * ROWS); ++r)
          for (int64_t v = 0; v < vectors; ++v)
            put(group * ROWS + r, column + v * LANES, load(sums_ + r * PIECE + v * LANES));
      }
    }
  }

  // N queries by `vectors` times 16 blocks, into sums_. Few rows of the summary at a time over many blocks: the rows
  // lie far apart, and this way each is read as a stream. The next ones are fetched meanwhile.
  template <int N>
  void dots(const float* data, const int32_t* pick, const float* weight, int64_t n, int64_t vectors) {
    const int64_t none = 2 * size_;  // the pick of padding: weight 0, any row
    const auto at = [&](int64_t i) { return data + (pick[i] == none ? 0 : pick[i] * stride_); };
    for (int r = 0; r < N; ++r) std::memset(sums_ + r * PIECE, 0, sizeof(vf) * vectors);
    for (int64_t i = 0; i < n; i += TOGETHER) {
      const float *row[TOGETHER], *next[TOGETHER];
      vf w[TOGETHER][N];
      for (int j = 0; j < TOGETHER; ++j) {
        row[j] = at(i + j), next[j] = at(i + TOGETHER + j);
        for (int r = 0; r < N; ++r) w[j][r] = splat(weight[r * (none + 1) + pick[i + j]]);
      }
      for (int64_t v = 0; v < vectors * LANES; v += LANES) {
        vf sum[N];
        for (int r = 0; r < N; ++r) sum[r] = load(sums_ + r * PIECE + v);
        for (int j = 0; j < TOGETHER; ++j) {
          __builtin_prefetch(next[j] + v, 0, 2);
          const vf k = load(row[j] + v);
          for (int r = 0; r < N; ++r) sum[r] += k * w[j][r];
        }
        for (int r = 0; r < N; ++r) store(sums_ + r * PIECE + v, sum[r]);
      }
    }
  }

  // The other kinds: the best of the entries that touch a block, for N rows.
  template <int N>
  void entries(const char* data, int64_t block, int64_t row, int64_t seen) {
    const int64_t per = page_ / step_;
    int64_t first = block * per;
    const int64_t last = std::min((block + 1) * per, (seen + step_ - 1) / step_);
    if (kind_ == Kind::submeans && first) --first;  // the run before reaches into this block
    float best[N];
    for (int r = 0; r < N; ++r) best[r] = NEG_INF;
    for (int64_t entry = first; entry < last; ++entry) {
      float s[N];
      if (kind_ == Kind::codes)
        levels<N>((const uint8_t*)data + entry * stride_, row, s);
      else if (kind_ == Kind::manhattan)
        distances<N>((const uint8_t*)data + entry * stride_, row, s);
      else if (narrow_)
        means<N>((const bf16*)data + entry * stride_, row, s);
      else
        means<N>((const float*)data + entry * stride_, row, s);
      for (int r = 0; r < N; ++r)
        if (entry * step_ < limits_[(row + r) / group_size_]) best[r] = nan_max(best[r], s[r]);
    }
    for (int r = 0; r < N; ++r) put(row + r, block, best[r]);
  }

  template <int N, class T>
  void means(const T* key, int64_t row, float* s) {
    vf sum[N] = {};
    for (int64_t d = 0; d < size_; d += LANES) {
      const vf k = load(key + d);
      for (int r = 0; r < N; ++r) sum[r] += k * load(&x_[(row + r) * size_ + d]);
    }
    for (int r = 0; r < N; ++r) s[r] = hsum(sum[r]);
  }

  template <int N>
  void levels(const uint8_t* key, int64_t row, float* s) {
    typedef uint8_t vb __attribute__((vector_size(LANES)));
    vf sum[N] = {};
    for (int64_t i = 0; i < width_; i += LANES) {
      vb bytes = {};
      std::memcpy(&bytes, key + i, std::min<int64_t>(LANES, bytes_));
      vi codes = __builtin_convertvector(bytes, vi);
      for (int part = 0; part < 4; ++part, codes >>= 2) {
        const vi inner = ((codes ^ (codes >> 1)) & 1) != 0;
        const vf size = select(inner, splat(INNER), splat(OUTER));
        const vf level = select((codes & 2) != 0, size, -size);
        for (int r = 0; r < N; ++r) sum[r] += level * load(&x_[((row + r) * 4 + part) * width_ + i]);
      }
    }
    for (int r = 0; r < N; ++r) s[r] = hsum(sum[r]);
  }

  template <int N>
  void distances(const uint8_t* key, int64_t row, float* s) {
    int64_t sum[N] = {};
    for (int64_t w = 0; w < words_; ++w) {
      uint64_t at[2];
      planes(key + 8 * w, std::min<int64_t>(8, bytes_ - 8 * w), at);
      for (int r = 0; r < N; ++r) {
        const uint64_t* own = &own_[(row + r) * 2 * words_ + 2 * w];
        sum[r] += std::popcount(at[0] ^ own[0]) + std::popcount(at[1] ^ own[1]);
      }
    }
    for (int r = 0; r < N; ++r) s[r] = -float(sum[r]);
  }

  const at::Tensor& q_;
  const char* data_;
  Kind kind_;
  Group group_;
  int64_t page_, rows_, size_, group_size_, batch_stride_, head_stride_, stride_;
  float scale_;
  bool narrow_;
  const float* thresholds_ = nullptr;
  int64_t threshold_stride_ = 0;
  int64_t step_, capacity_, bytes_, width_, words_;

  alignas(64) float sums_[ROWS * PIECE];
  std::vector<float> x_, weights_;
  std::vector<uint64_t> own_;
  std::vector<int32_t> picks_;
  std::vector<int64_t> n_;
  float* out_ = nullptr;
  int64_t out_head_ = 0;
  const int64_t* limits_ = nullptr;
};

}  // namespace agentctx
