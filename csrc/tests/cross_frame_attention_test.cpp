// Forward and backward of cross-frame attention against a float64 double loop.
#include "cross_frame_attention/cross_frame_attention.h"

#include "tests/oracle.h"

namespace zsvr::test {
namespace {

struct Shape {
  int64_t B, T, Tk, P, H, D, R;
};

struct Oracle {
  std::vector<double> o, lse, dq, dk, dv;
};

Oracle solve(const Shape& s, const std::vector<int32_t>& frames, double scale, const Buffer& q,
             const Buffer& k, const Buffer& v, const Buffer& d_o, const std::vector<float>& dlse) {
  Oracle oracle;
  const auto index = [&s](int64_t T, int64_t b, int64_t t, int64_t p, int64_t h) {
    return (((b * T + t) * s.P + p) * s.H + h) * s.D;
  };
  oracle.o.assign(static_cast<size_t>(s.B * s.T * s.P * s.H * s.D), 0.0);
  oracle.dq = oracle.o;
  oracle.lse.assign(static_cast<size_t>(s.B * s.T * s.P * s.H), -INFINITY);
  oracle.dk.assign(static_cast<size_t>(s.B * s.Tk * s.P * s.H * s.D), 0.0);
  oracle.dv = oracle.dk;
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t i = 0; i < s.T; ++i)
      for (int64_t h = 0; h < s.H; ++h)
        for (int64_t p = 0; p < s.P; ++p) {
          std::vector<double> z;
          std::vector<std::pair<int64_t, int64_t>> keys;
          for (int64_t r = 0; r < s.R; ++r) {
            const int32_t j = frames[static_cast<size_t>(i * s.R + r)];
            for (int64_t n = 0; j >= 0 && n < s.P; ++n) {
              double sum = 0.0;
              for (int64_t d = 0; d < s.D; ++d) sum += q.at(b, i, p, h, d) * k.at(b, j, n, h, d);
              z.push_back(scale * sum);
              keys.emplace_back(j, n);
            }
          }
          if (z.empty()) continue;
          double peak = -INFINITY, total = 0.0;
          for (const double x : z) peak = std::fmax(peak, x);
          for (const double x : z) total += std::exp(x - peak);
          const double lse = peak + std::log(total);
          const int64_t row = ((b * s.T + i) * s.P + p) * s.H + h, at = index(s.T, b, i, p, h);
          oracle.lse[static_cast<size_t>(row)] = lse;
          for (size_t m = 0; m < z.size(); ++m) {
            const double weight = std::exp(z[m] - lse);
            for (int64_t d = 0; d < s.D; ++d)
              oracle.o[static_cast<size_t>(at + d)] +=
                  weight * v.at(b, keys[m].first, keys[m].second, h, d);
          }
          double delta = -dlse[static_cast<size_t>(row)];
          for (int64_t d = 0; d < s.D; ++d)
            delta += d_o.at(b, i, p, h, d) * oracle.o[static_cast<size_t>(at + d)];
          for (size_t m = 0; m < z.size(); ++m) {
            const auto [j, n] = keys[m];
            const double weight = std::exp(z[m] - lse);
            double dp = 0.0;
            for (int64_t d = 0; d < s.D; ++d) dp += d_o.at(b, i, p, h, d) * v.at(b, j, n, h, d);
            const double ds = weight * (dp - delta);
            const int64_t to = index(s.Tk, b, j, n, h);
            for (int64_t d = 0; d < s.D; ++d) {
              oracle.dq[static_cast<size_t>(at + d)] += scale * ds * k.at(b, j, n, h, d);
              oracle.dk[static_cast<size_t>(to + d)] += scale * ds * q.at(b, i, p, h, d);
              oracle.dv[static_cast<size_t>(to + d)] += weight * d_o.at(b, i, p, h, d);
            }
          }
        }
  return oracle;
}

int check_shape(const Shape& s, DType dtype, std::mt19937& random) {
  Buffer q(dtype, s.B, s.T, s.P, s.H, s.D), k(dtype, s.B, s.Tk, s.P, s.H, s.D),
      v(dtype, s.B, s.Tk, s.P, s.H, s.D), d_o(dtype, s.B, s.T, s.P, s.H, s.D);
  for (Buffer* x : {&q, &k, &v, &d_o}) x->fill(random);
  std::vector<int32_t> frames(static_cast<size_t>(s.T * s.R));
  for (auto& f : frames) f = static_cast<int32_t>(random() % (s.Tk + 1)) - 1;
  std::vector<float> dlse(static_cast<size_t>(s.B * s.T * s.P * s.H));
  for (auto& x : dlse) x = static_cast<float>(random() % 100) / 50.0f - 1.0f;
  for (int64_t i = 0; i < s.T; ++i) {  // the gradient of -inf is not asked for
    bool empty = true;
    for (int64_t r = 0; r < s.R; ++r) empty = empty && frames[static_cast<size_t>(i * s.R + r)] < 0;
    for (int64_t b = 0; empty && b < s.B; ++b)
      for (int64_t n = 0; n < s.P * s.H; ++n)
        dlse[static_cast<size_t>((b * s.T + i) * s.P * s.H + n)] = 0.0f;
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.D));
  const Oracle oracle = solve(s, frames, scale, q, k, v, d_o, dlse);

  int failures = 0;
  std::unique_ptr<Buffer> first_o, first_dk;
  for (const int threads : {1, 3}) {
    auto o = std::make_unique<Buffer>(dtype, s.B, s.T, s.P, s.H, s.D);
    std::vector<float> lse(dlse.size());
    CrossFrameAttentionParams p;
    p.B = s.B, p.T = s.T, p.Tk = s.Tk, p.P = s.P, p.H = s.H, p.D = s.D, p.R = s.R;
    p.dtype = dtype, p.scale = scale, p.frames = frames.data(), p.lse = lse.data();
    p.q = q.view<ConstTokens>(), p.k = k.view<ConstTokens>(), p.v = v.view<ConstTokens>();
    p.o = o->view<Tokens>();
    const Workspace scratch(cross_frame_attention_fwd_workspace(p, threads));
    p.workspace = scratch.data();
    failures += expect(cross_frame_attention_fwd(p, executor_of(threads)).ok(), "forward status");
    const double limit = tolerance(dtype);
    failures += compare("o", o->count(), [&](int64_t n) { return o->element(n); }, oracle.o, limit);
    failures += compare(
        "lse", static_cast<int64_t>(lse.size()),
        [&](int64_t n) { return lse[static_cast<size_t>(n)]; }, oracle.lse, 1e-4);

    auto dk = std::make_unique<Buffer>(dtype, s.B, s.Tk, s.P, s.H, s.D);
    Buffer dq(dtype, s.B, s.T, s.P, s.H, s.D), dv(dtype, s.B, s.Tk, s.P, s.H, s.D);
    CrossFrameAttentionBackwardParams g;
    g.B = s.B, g.T = s.T, g.Tk = s.Tk, g.P = s.P, g.H = s.H, g.D = s.D, g.R = s.R;
    g.dtype = dtype, g.scale = scale, g.frames = frames.data();
    g.lse = lse.data(), g.dlse = dlse.data();
    g.q = p.q, g.k = p.k, g.v = p.v, g.o = o->view<ConstTokens>(), g.d_o = d_o.view<ConstTokens>();
    g.dq = dq.view<Tokens>(), g.dk = dk->view<Tokens>(), g.dv = dv.view<Tokens>();
    const Workspace more(cross_frame_attention_bwd_workspace(g, threads));
    g.workspace = more.data();
    failures += expect(cross_frame_attention_bwd(g, executor_of(threads)).ok(), "backward status");
    failures +=
        compare("dq", dq.count(), [&](int64_t n) { return dq.element(n); }, oracle.dq, limit);
    failures +=
        compare("dk", dk->count(), [&](int64_t n) { return dk->element(n); }, oracle.dk, limit);
    failures +=
        compare("dv", dv.count(), [&](int64_t n) { return dv.element(n); }, oracle.dv, limit);
    if (first_o) {
      failures += expect(first_o->same_bits(*o) && first_dk->same_bits(*dk), "thread independence");
    } else {
      first_o = std::move(o), first_dk = std::move(dk);
    }
  }
  return failures;
}

int check_refusals() {
  int32_t frames[1] = {3};
  CrossFrameAttentionParams p;
  p.B = p.T = p.P = p.H = p.R = 1, p.Tk = 2, p.D = 16, p.frames = frames;
  int failures = expect(check(p).code == StatusCode::kInvalidArgument, "frame beyond Tk");
  frames[0] = -2;
  failures += expect(check(p).code == StatusCode::kInvalidArgument, "frame below -1");
  frames[0] = -1;
  failures += expect(check(p).ok(), "absent frame");
  p.D = 12;
  failures += expect(check(p).code == StatusCode::kUnsupported, "head dim 12");
  p.D = 264;
  failures += expect(check(p).code == StatusCode::kUnsupported, "head dim 264");
  p.D = 16, p.P = 0;
  return failures + expect(check(p).code == StatusCode::kInvalidArgument, "no sites");
}

}  // namespace
}  // namespace zsvr::test

int test_cross_frame_attention() {
  using namespace zsvr::test;
  std::mt19937 random(1);
  int failures = check_refusals();
  const Shape shapes[] = {{1, 1, 1, 1, 1, 8, 1},    {2, 3, 2, 7, 2, 24, 2},
                          {1, 2, 2, 65, 1, 40, 2},  {1, 2, 3, 33, 3, 72, 3},
                          {1, 1, 2, 197, 1, 64, 2}, {1, 2, 2, 19, 1, 256, 1}};
  for (const Shape& shape : shapes) {
    for (const auto dtype :
         {zsvr::DType::kFloat32, zsvr::DType::kBFloat16, zsvr::DType::kFloat16}) {
      failures += check_shape(shape, dtype, random);
    }
  }
  return failures;
}
