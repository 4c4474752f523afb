// Rotary positions. Angles are float32(position) * inv_freq in float32; their cosines and sines are made once for each
// token and serve all heads. A move composes two rotations from their own angles.
#include "ops.h"

namespace agentctx {
namespace {

typedef double vd __attribute__((vector_size(128)));  // 16 doubles

constexpr double TWO_OVER_PI = 0.63661977236758134308;
constexpr double PIO2_HIGH = 1.57079632673412561417;  // 33 bits, so that a product with a count below 2**20 is exact
constexpr double PIO2_LOW = 6.07710050650619224932e-11;
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2**52: the nearest integer in the low bits

// Cosine and sine of 16 angles, |angle| < 2**31, to 1e-7. The reduction is done in double: an angle of a million
// radians has only float32's 2**-4 of precision, but that value's cosine is well defined.
inline void cos_sin(vf angle, vf& cosine, vf& sine) {
  const vd a = __builtin_convertvector(angle, vd);
  const vd n = (a * TWO_OVER_PI + MAGIC) - MAGIC;
  const vf r = __builtin_convertvector((a - n * PIO2_HIGH) - n * PIO2_LOW, vf);
  const vi quadrant = __builtin_convertvector(n, vi) & 3;
  const vf z = r * r;
  vf s = splat(-1.9515295891e-4f);
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * r + r;
  vf c = splat(2.443315711809948e-5f);
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.f;
  const vi swap = (quadrant & 1) != 0;
  const vf cos_size = select(swap, s, c), sin_size = select(swap, c, s);
  cosine = select(((quadrant + 1) & 2) != 0, -cos_size, cos_size);
  sine = select((quadrant & 2) != 0, -sin_size, sin_size);
}

// The angles of one position, `half` of them, padded to whole vectors.
inline void angles(float position, const float* inv_freq, int64_t half, float* cosine, float* sine) {
  for (int64_t i = 0; i < half; i += LANES) {
    float part[LANES] = {};
    std::memcpy(part, inv_freq + i, std::min<int64_t>(half - i, LANES) * sizeof(float));
    vf c, s;
    cos_sin(load(part) * position, c, s);
    store(cosine + i, c);
    store(sine + i, s);
  }
}

template <class T>
inline void rotate_pair(T& a, T& b, float c, float s) {
  const float x = to_float(a), y = to_float(b);
  a = from_float<T>(x * c - y * s);
  b = from_float<T>(y * c + x * s);
}

// One row in the "half" style: channel i goes with channel i + half.
template <class T>
inline void rotate_half(T* x, int64_t half, const float* cosine, const float* sine) {
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const vf a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) rotate_pair(x[i], x[half + i], cosine[i], sine[i]);
}

// One row in the "interleaved" style: channel 2 i goes with 2 i + 1.
template <class T>
inline void rotate_interleaved(T* x, int64_t half, const float* cosine, const float* sine) {
  for (int64_t i = 0; i < half; ++i) rotate_pair(x[2 * i], x[2 * i + 1], cosine[i], sine[i]);
}

struct Positions {
  const void* data;
  int64_t batch, token;
  bool wide;
  explicit Positions(const at::Tensor& p)
      : data(p.const_data_ptr()), batch(p.dim() == 2 ? p.stride(0) : 0), token(p.stride(p.dim() - 1)),
        wide(p.scalar_type() == at::kLong) {}
  float at(int64_t b, int64_t t) const {
    const int64_t i = b * batch + t * token;
    return wide ? float(((const int64_t*)data)[i]) : float(((const int32_t*)data)[i]);
  }
};

}  // namespace

// x, out [B, H, T, D]; out may be x. With `old_positions` the row is first turned back from there.
void rope(const at::Tensor& x, const at::Tensor& out, const at::Tensor& positions, const at::Tensor& inv_freq,
          const std::optional<at::Tensor>& old_positions, const at::Tensor& old_inv_freq, bool inverse,
          bool interleaved, double scaling, int64_t threads) {
  const int64_t heads = x.size(1), tokens = x.size(2), size = x.size(3), half = inv_freq.size(0);
  const int64_t padded = (half + LANES - 1) / LANES * LANES;
  const Positions now(positions), before(old_positions ? *old_positions : positions);
  const float *freq = inv_freq.const_data_ptr<float>(), *old_freq = old_inv_freq.const_data_ptr<float>();
  const bool moves = old_positions.has_value(), copies = x.const_data_ptr() != out.const_data_ptr();
  const float c_scale = float(inverse ? 1 / scaling : scaling), s_scale = inverse ? -c_scale : c_scale;
  auto run = [&]<class T>(T) {
    const T* from = (const T*)x.const_data_ptr();
    T* to = (T*)out.mutable_data_ptr();
    const int64_t xb = x.stride(0), xh = x.stride(1), xt = x.stride(2);
    const int64_t ob = out.stride(0), oh = out.stride(1), ot = out.stride(2);
    parallel(x.size(0) * tokens, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> table(4 * padded);
      float *cosine = table.data(), *sine = cosine + padded, *old_cosine = sine + padded,
            *old_sine = old_cosine + padded;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens, t = i % tokens;
        angles(now.at(b, t), freq, half, cosine, sine);
        if (moves) angles(before.at(b, t), old_freq, half, old_cosine, old_sine);
        for (int64_t j = 0; j < half; j += LANES) {
          vf c = load(cosine + j), s = load(sine + j);
          if (moves) {
            const vf a = load(old_cosine + j), o = load(old_sine + j), turned = c * a + s * o;
            s = s * a - c * o;
            c = turned;
          }
          store(cosine + j, c * c_scale);
          store(sine + j, s * s_scale);
        }
        for (int64_t h = 0; h < heads; ++h) {
          T* row = to + b * ob + h * oh + t * ot;
          if (copies) std::memcpy(row, from + b * xb + h * xh + t * xt, size * sizeof(T));
          interleaved ? rotate_interleaved(row, half, cosine, sine) : rotate_half(row, half, cosine, sine);
        }
      }
    });
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(bf16{});
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def(
      "rope(Tensor x, Tensor(a!) out, Tensor positions, Tensor inv_freq, Tensor? old_positions, Tensor old_inv_freq, "
      "bool inverse, bool interleaved, float scaling, int threads) -> ()",
      &agentctx::rope);
}
