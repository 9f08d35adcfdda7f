// Forward, inverse index and backward of trajectory attention against a float64 loop, and hostile
// positions.
#include "trajectory_attention/trajectory_attention.h"

#include "tests/oracle.h"

namespace zsvr::test {
namespace {

struct Shape {
  int64_t B, Bp, T, Tk, Hg, Wg, H, D, L;
  int64_t P() const { return Hg * Wg; }
};

struct Tracks {
  std::vector<float> positions;
  std::vector<uint8_t> valid;
  std::vector<int32_t> frames;
};

Tracks random_tracks(const Shape& s, std::mt19937& random) {
  Tracks tracks;
  const size_t samples = static_cast<size_t>(s.Bp * s.T * s.L * s.P());
  std::uniform_real_distribution<float> x(-1.5f, static_cast<float>(s.Wg) + 0.5f);
  std::uniform_real_distribution<float> y(-1.5f, static_cast<float>(s.Hg) + 0.5f);
  for (size_t n = 0; n < samples; ++n) {
    const bool whole = random() % 4 == 0;
    tracks.positions.push_back(whole ? std::round(x(random)) : x(random));
    tracks.positions.push_back(whole ? std::round(y(random)) : y(random));
    tracks.valid.push_back(random() % 4 != 0);
  }
  for (int64_t n = 0; n < s.T * s.L; ++n) {
    tracks.frames.push_back(static_cast<int32_t>(random() % (s.Tk + 1)) - 1);
  }
  return tracks;
}

struct Corner {
  int64_t site;
  double weight;
};

std::vector<Corner> corners_of(const Shape& s, const float* position) {
  const double x = std::fmin(std::fmax(position[0], 0.0), static_cast<double>(s.Wg - 1));
  const double y = std::fmin(std::fmax(position[1], 0.0), static_cast<double>(s.Hg - 1));
  const int64_t x0 = static_cast<int64_t>(x), y0 = static_cast<int64_t>(y);
  const int64_t x1 = std::min(x0 + 1, s.Wg - 1), y1 = std::min(y0 + 1, s.Hg - 1);
  const double fx = x - static_cast<double>(x0), fy = y - static_cast<double>(y0);
  return {{y0 * s.Wg + x0, (1 - fx) * (1 - fy)},
          {y0 * s.Wg + x1, fx * (1 - fy)},
          {y1 * s.Wg + x0, (1 - fx) * fy},
          {y1 * s.Wg + x1, fx * fy}};
}

int check_shape(const Shape& s, DType dtype, std::mt19937& random) {
  const int64_t P = s.P();
  Buffer q(dtype, s.B, s.T, P, s.H, s.D), k(dtype, s.B, s.Tk, P, s.H, s.D),
      v(dtype, s.B, s.Tk, P, s.H, s.D), d_o(dtype, s.B, s.T, P, s.H, s.D);
  for (Buffer* x : {&q, &k, &v, &d_o}) x->fill(random);
  const Tracks tracks = random_tracks(s, random);
  const double scale = 0.3;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<double> o(size(s.B * s.T * P * s.H * s.D), 0.0), dq(o);
  std::vector<double> dk(size(s.B * s.Tk * P * s.H * s.D), 0.0), dv(dk);
  std::vector<double> lses(size(s.B * s.T * P * s.H), -INFINITY);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t i = 0; i < s.T; ++i)
      for (int64_t p = 0; p < P; ++p)
        for (int64_t h = 0; h < s.H; ++h) {
          struct Live {
            int64_t j;
            std::vector<Corner> corners;
            double z;
          };
          std::vector<Live> live;
          for (int64_t l = 0; l < s.L; ++l) {
            const int64_t sample = ((b % s.Bp * s.T + i) * s.L + l) * P + p;
            const int32_t j = tracks.frames[size(i * s.L + l)];
            if (j < 0 || !tracks.valid[size(sample)]) continue;
            Live slot{j, corners_of(s, &tracks.positions[size(2 * sample)]), 0.0};
            for (const Corner& c : slot.corners)
              for (int64_t d = 0; d < s.D; ++d)
                slot.z += scale * c.weight * q.at(b, i, p, h, d) * k.at(b, j, c.site, h, d);
            live.push_back(slot);
          }
          if (live.empty()) continue;
          double total = 0.0;
          for (const Live& slot : live) total += std::exp(slot.z);
          const int64_t row = ((b * s.T + i) * P + p) * s.H + h;
          lses[size(row)] = std::log(total);
          std::vector<double> products;
          double delta = 0.0;
          for (const Live& slot : live) {
            const double weight = std::exp(slot.z) / total;
            double product = 0.0;
            for (const Corner& c : slot.corners)
              for (int64_t d = 0; d < s.D; ++d) {
                const double value = c.weight * v.at(b, slot.j, c.site, h, d);
                o[size(row * s.D + d)] += weight * value;
                product += d_o.at(b, i, p, h, d) * value;
              }
            products.push_back(product);
            delta += weight * product;
          }
          for (size_t n = 0; n < live.size(); ++n) {
            const double weight = std::exp(live[n].z) / total, ds = weight * (products[n] - delta);
            for (const Corner& c : live[n].corners) {
              const int64_t to = ((b * s.Tk + live[n].j) * P + c.site) * s.H + h;
              for (int64_t d = 0; d < s.D; ++d) {
                dq[size(row * s.D + d)] += scale * ds * c.weight * k.at(b, live[n].j, c.site, h, d);
                dk[size(to * s.D + d)] += scale * ds * c.weight * q.at(b, i, p, h, d);
                dv[size(to * s.D + d)] += weight * c.weight * d_o.at(b, i, p, h, d);
              }
            }
          }
        }

  TrajectoryInverseParams inverse;
  inverse.Bp = s.Bp, inverse.T = s.T, inverse.Tk = s.Tk, inverse.Hg = s.Hg, inverse.Wg = s.Wg;
  inverse.L = s.L, inverse.positions = tracks.positions.data(), inverse.valid = tracks.valid.data();
  inverse.frames = tracks.frames.data();
  std::vector<int64_t> offsets(size(s.Bp * s.Tk * P + 1));
  inverse.offsets = offsets.data();
  int failures = expect(trajectory_inverse_count(inverse, executor_of(3)).ok(), "count status");
  std::vector<int32_t> samples(size(offsets.back()));
  std::vector<float> weights(samples.size());
  const std::vector<int64_t> counted = offsets;
  inverse.samples = samples.data(), inverse.weights = weights.data();
  failures += expect(trajectory_inverse_fill(inverse, executor_of(3)).ok(), "fill status");
  failures += expect(counted == offsets, "offsets survive filling");

  std::unique_ptr<Buffer> first;
  for (const int threads : {1, 3}) {
    Buffer out(dtype, s.B, s.T, P, s.H, s.D), out_dq(dtype, s.B, s.T, P, s.H, s.D);
    Buffer out_dv(dtype, s.B, s.Tk, P, s.H, s.D);
    auto out_dk = std::make_unique<Buffer>(dtype, s.B, s.Tk, P, s.H, s.D);
    std::vector<float> lse(lses.size()), dpositions(tracks.positions.size(), NAN);
    TrajectoryAttentionParams f;
    TrajectoryAttentionBackwardParams g;
    const auto common = [&](auto& p) {
      p.B = s.B, p.Bp = s.Bp, p.T = s.T, p.Tk = s.Tk, p.Hg = s.Hg, p.Wg = s.Wg, p.H = s.H;
      p.D = s.D, p.L = s.L, p.dtype = dtype, p.scale = static_cast<float>(scale);
      p.q = q.view<ConstTokens>(), p.k = k.view<ConstTokens>(), p.v = v.view<ConstTokens>();
      p.positions = tracks.positions.data(), p.valid = tracks.valid.data();
      p.frames = tracks.frames.data(), p.lse = lse.data();
    };
    common(f), common(g);
    f.o = out.view<Tokens>();
    const Workspace scratch(trajectory_attention_fwd_workspace(f, threads));
    f.workspace = scratch.data();
    failures += expect(trajectory_attention_fwd(f, executor_of(threads)).ok(), "forward status");
    g.d_o = d_o.view<ConstTokens>(), g.dq = out_dq.view<Tokens>(), g.dk = out_dk->view<Tokens>();
    g.dv = out_dv.view<Tokens>(), g.dpositions = dpositions.data();
    g.offsets = offsets.data(), g.samples = samples.data(), g.weights = weights.data();
    const Workspace more(trajectory_attention_bwd_workspace(g, threads));
    g.workspace = more.data();
    failures += expect(trajectory_attention_bwd(g, executor_of(threads)).ok(), "backward status");
    const double limit = tolerance(dtype);
    const auto element = [](const Buffer& x) { return [&x](int64_t n) { return x.element(n); }; };
    failures += compare("o", out.count(), element(out), o, limit);
    failures += compare(
        "lse", static_cast<int64_t>(lse.size()), [&](int64_t n) { return lse[size(n)]; }, lses,
        1e-4);
    failures += compare("dq", out_dq.count(), element(out_dq), dq, limit);
    failures += compare("dk", out_dk->count(), element(*out_dk), dk, limit);
    failures += compare("dv", out_dv.count(), element(out_dv), dv, limit);
    for (const float x : dpositions) failures += expect(std::isfinite(x), "dpositions is written");
    if (first) failures += expect(first->same_bits(*out_dk), "thread independence");
    first = std::move(out_dk);
  }
  return failures;
}

int check_hostile_positions() {
  const float wild[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 2147483648.0f, -0.0f, 1e-40f};
  Buffer q(DType::kFloat32, 1, 1, 6, 1, 8), o(DType::kFloat32, 1, 1, 6, 1, 8);
  std::mt19937 random(3);
  q.fill(random);
  std::vector<float> positions, lse(6);
  for (int n = 0; n < 2 * 6 * 4; ++n) positions.push_back(wild[(n * 5 + n / 7) % 8]);
  std::vector<uint8_t> valid(24, 1);
  std::vector<int32_t> frames(4, 0);
  TrajectoryAttentionParams p;
  p.B = p.Bp = p.T = p.Tk = p.H = 1, p.Hg = 2, p.Wg = 3, p.D = 8, p.L = 4, p.scale = 1.0f;
  p.q = p.k = p.v = q.view<ConstTokens>(), p.o = o.view<Tokens>();
  p.positions = positions.data(), p.valid = valid.data(), p.frames = frames.data();
  p.lse = lse.data();
  const Workspace scratch(trajectory_attention_fwd_workspace(p, 1));
  p.workspace = scratch.data();
  int failures = expect(trajectory_attention_fwd(p, executor_of(1)).ok(), "hostile positions");
  for (int64_t n = 0; n < o.count(); ++n) failures += expect(std::isfinite(o.element(n)), "finite");
  frames[2] = 1;
  return failures + expect(!trajectory_attention_fwd(p, executor_of(1)).ok(), "frame beyond Tk");
}

}  // namespace
}  // namespace zsvr::test

int test_trajectory_attention() {
  using namespace zsvr::test;
  std::mt19937 random(2);
  int failures = check_hostile_positions();
  const Shape shapes[] = {{1, 1, 1, 1, 1, 1, 1, 8, 1},   {2, 1, 2, 3, 1, 5, 2, 24, 3},
                          {2, 2, 3, 2, 5, 3, 3, 40, 2},  {1, 1, 2, 2, 9, 11, 9, 16, 3},
                          {1, 1, 2, 2, 3, 4, 1, 160, 5}, {1, 1, 1, 2, 2, 2, 2, 256, 70}};
  for (const Shape& shape : shapes) {
    for (const auto dtype :
         {zsvr::DType::kFloat32, zsvr::DType::kBFloat16, zsvr::DType::kFloat16}) {
      failures += check_shape(shape, dtype, random);
    }
  }
  return failures;
}
