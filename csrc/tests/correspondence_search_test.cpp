// Search and link scores against a float64 loop, with exact-size buffers, hostile centres and positions.
#include "correspondence_search/correspondence_search.h"

#include <algorithm>

#include "tests/oracle.h"

namespace zsvr::test {
namespace {

struct Shape {
  int64_t N, Hg, Wg, C, radius;
  int64_t P() const { return Hg * Wg; }
};

struct Found {
  std::vector<int32_t> site;
  std::vector<float> score;
};

ConstFeatures features(const Buffer& x) {
  const auto tokens = x.view<ConstTokens>();
  return {tokens.data, tokens.stride_b, tokens.stride_p};
}

double cosine(const Buffer& a, const Buffer& b, int64_t n, int64_t p, int64_t s, int64_t C) {
  double dot = 0.0, aa = 0.0, bb = 0.0;
  for (int64_t c = 0; c < C; ++c) {
    const double x = a.at(n, 0, p, 0, c), y = b.at(n, 0, s, 0, c);
    dot += x * y, aa += x * x, bb += y * y;
  }
  return dot / (std::fmax(std::sqrt(aa), 1e-6) * std::fmax(std::sqrt(bb), 1e-6));
}

Found search(const Shape& s, DType dtype, const Buffer& f_src, const Buffer& f_dst,
             const std::vector<int32_t>& centre, int threads, int* failures) {
  Found found;
  found.site.assign(static_cast<size_t>(s.N * s.P()), -7);
  found.score.assign(found.site.size(), NAN);
  CorrespondenceSearchParams p;
  p.N = s.N, p.Hg = s.Hg, p.Wg = s.Wg, p.C = s.C, p.radius = s.radius, p.dtype = dtype;
  p.f_src = features(f_src), p.f_dst = features(f_dst), p.centre = centre.data();
  p.site = found.site.data(), p.score = found.score.data();
  const Workspace scratch(correspondence_search_workspace(p));
  p.workspace = scratch.data();
  *failures += expect(correspondence_search(p, executor_of(threads)).ok(), "search status");
  return found;
}

// Offsets from the own site: most equal, some not, some far outside the grid.
std::vector<int32_t> centres(const Shape& s, std::mt19937& random) {
  const int32_t wild[] = {INT32_MIN, INT32_MAX, -1, 1 << 30};
  const int32_t common = static_cast<int32_t>(random() % 3) - 1;
  std::vector<int32_t> centre;
  for (int64_t n = 0; n < s.N * s.P(); ++n) {
    const auto kind = random() % 16;
    for (const int64_t own : {n % s.P() % s.Wg, n % s.P() / s.Wg}) {
      int32_t at = static_cast<int32_t>(own) + common;
      if (kind == 0) at = wild[random() % 4];
      if (kind == 1) at += static_cast<int32_t>(random() % 5) - 2;
      centre.push_back(at);
    }
  }
  return centre;
}

int check_search(const Shape& s, DType dtype, std::mt19937& random) {
  const int64_t P = s.P();
  Buffer f_src(dtype, s.N, 1, P, 1, s.C), f_dst(dtype, s.N, 1, P, 1, s.C);
  f_src.fill(random), f_dst.fill(random);
  const std::vector<int32_t> centre = centres(s, random);
  int failures = 0;
  const Found one = search(s, dtype, f_src, f_dst, centre, 1, &failures);
  const Found many = search(s, dtype, f_src, f_dst, centre, 3, &failures);
  failures += expect(one.site == many.site && one.score == many.score, "threads agree");
  for (int64_t n = 0; n < s.N * P && failures == 0; ++n) {
    const auto at = static_cast<size_t>(n);
    const int64_t x = std::clamp<int64_t>(centre[2 * at], 0, s.Wg - 1);
    const int64_t y = std::clamp<int64_t>(centre[2 * at + 1], 0, s.Hg - 1);
    double best = -INFINITY;
    for (int64_t v = std::max<int64_t>(0, y - s.radius); v <= std::min(s.Hg - 1, y + s.radius); ++v)
      for (int64_t u = std::max<int64_t>(0, x - s.radius); u <= std::min(s.Wg - 1, x + s.radius);
           ++u)
        best = std::fmax(best, cosine(f_src, f_dst, n / P, n % P, v * s.Wg + u, s.C));
    const int64_t site = one.site[at];
    const bool inside = site >= 0 && site < P && std::abs(site % s.Wg - x) <= s.radius &&
                        std::abs(site / s.Wg - y) <= s.radius;
    failures += expect(inside, "the site lies in the window");
    if (!inside) break;
    const double own = cosine(f_src, f_dst, n / P, n % P, site, s.C);
    failures += expect(std::fabs(own - best) < 2e-6, "no candidate is better");
    failures += expect(std::fabs(one.score[at] - own) < 2e-6, "the score is the site's");
  }
  return failures;
}

// Equal tokens: the lowest site of the window wins; tokens without numbers: the same and -inf.
int check_ties() {
  int failures = 0;
  for (const Shape& s : {Shape{1, 6, 7, 19, 2}, Shape{2, 5, 5, 3, 4}, Shape{1, 1, 9, 8, 1}}) {
    for (const bool numbers : {true, false}) {
      Buffer x(DType::kFloat32, s.N, 1, s.P(), 1, s.C);  // NaN
      std::mt19937 random(5);
      if (numbers) {
        x.fill(random);
        const auto tokens = x.view<Tokens>();
        for (int64_t n = 0; n < s.N; ++n)
          for (int64_t p = 1; p < s.P(); ++p)
            std::memcpy(tokens.at<float>(n, 0, p, 0), tokens.at<float>(n, 0, 0, 0),
                        static_cast<size_t>(4 * s.C));
      }
      std::vector<int32_t> centre;
      for (int64_t n = 0; n < s.N * s.P(); ++n) {
        centre.push_back(static_cast<int32_t>(n % s.P() % s.Wg));
        centre.push_back(static_cast<int32_t>(n % s.P() / s.Wg));
      }
      const Found found = search(s, DType::kFloat32, x, x, centre, 2, &failures);
      for (int64_t n = 0; n < s.N * s.P(); ++n) {
        const int64_t u = std::max<int64_t>(0, n % s.P() % s.Wg - s.radius);
        const int64_t v = std::max<int64_t>(0, n % s.P() / s.Wg - s.radius);
        const float score = found.score[static_cast<size_t>(n)];
        failures += expect(found.site[static_cast<size_t>(n)] == v * s.Wg + u, "the lowest site");
        failures += expect(numbers ? std::fabs(score - 1.0f) < 1e-5f : score == -INFINITY,
                           "the score of equals");
      }
    }
  }
  return failures;
}

int check_score(const Shape& s, DType dtype, std::mt19937& random) {
  const int64_t P = s.P();
  Buffer f_src(dtype, s.N, 1, P, 1, s.C), f_dst(dtype, s.N, 1, P, 1, s.C);
  f_src.fill(random), f_dst.fill(random);
  const float wild[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e-40f, -0.0f};
  std::uniform_real_distribution<float> near(-1.5f,
                                             static_cast<float>(std::max(s.Hg, s.Wg)) + 0.5f);
  std::vector<float> positions;
  for (int64_t n = 0; n < 2 * s.N * P; ++n) {
    const auto kind = random() % 8;
    const float x = near(random);
    positions.push_back(kind == 0 ? wild[random() % 6] : kind < 3 ? std::round(x) : x);
  }
  std::vector<double> expected;
  for (int64_t n = 0; n < s.N * P; ++n) {
    double at[2];
    for (int axis = 0; axis < 2; ++axis) {
      const double last = static_cast<double>((axis == 0 ? s.Wg : s.Hg) - 1);
      const float x = positions[static_cast<size_t>(2 * n + axis)];
      at[axis] = std::isnan(x) ? 0.0 : std::clamp<double>(x, 0.0, last);
    }
    const auto x0 = static_cast<int64_t>(at[0]), y0 = static_cast<int64_t>(at[1]);
    const int64_t x1 = std::min(x0 + 1, s.Wg - 1), y1 = std::min(y0 + 1, s.Hg - 1);
    const double fx = at[0] - static_cast<double>(x0), fy = at[1] - static_cast<double>(y0);
    double dot = 0.0, aa = 0.0, bb = 0.0;
    for (int64_t c = 0; c < s.C; ++c) {
      const auto read = [&](int64_t x, int64_t y) {
        return f_dst.at(n / P, 0, y * s.Wg + x, 0, c);
      };
      const double a = f_src.at(n / P, 0, n % P, 0, c);
      const double b = (1 - fx) * (1 - fy) * read(x0, y0) + fx * (1 - fy) * read(x1, y0) +
                       (1 - fx) * fy * read(x0, y1) + fx * fy * read(x1, y1);
      dot += a * b, aa += a * a, bb += b * b;
    }
    expected.push_back(dot / (std::fmax(std::sqrt(aa), 1e-6) * std::fmax(std::sqrt(bb), 1e-6)));
  }
  int failures = 0;
  std::vector<float> first;
  for (const int threads : {1, 3}) {
    std::vector<float> score(expected.size(), NAN);
    LinkScoreParams p;
    p.N = s.N, p.Hg = s.Hg, p.Wg = s.Wg, p.C = s.C, p.dtype = dtype;
    p.f_src = features(f_src), p.f_dst = features(f_dst);
    p.positions = positions.data(), p.score = score.data();
    failures += expect(link_score(p, executor_of(threads)).ok(), "score status");
    failures += compare(
        "link score", static_cast<int64_t>(score.size()),
        [&](int64_t n) { return score[static_cast<size_t>(n)]; }, expected, 1e-5);
    if (!first.empty()) failures += expect(first == score, "threads agree");
    first = score;
  }
  return failures;
}

int check_refusals() {
  CorrespondenceSearchParams p;
  p.N = p.Hg = p.Wg = p.C = 1, p.radius = -1;
  int failures = expect(!correspondence_search(p, executor_of(1)).ok(), "a negative radius");
  p.radius = 0, p.Hg = p.Wg = 1 << 20;
  failures += expect(!correspondence_search(p, executor_of(1)).ok(), "too many sites");
  LinkScoreParams q;
  q.N = q.Hg = q.Wg = 1;
  return failures + expect(!link_score(q, executor_of(1)).ok(), "no channel");
}

}  // namespace
}  // namespace zsvr::test

int test_correspondence_search() {
  using namespace zsvr::test;
  std::mt19937 random(6);
  int failures = check_ties() + check_refusals();
  const Shape shapes[] = {{1, 1, 1, 1, 0},  {2, 5, 7, 3, 1},    {1, 8, 8, 64, 2}, {3, 1, 9, 40, 4},
                          {1, 9, 1, 17, 2}, {1, 11, 6, 33, 70}, {1, 16, 19, 8, 3}};
  for (const Shape& shape : shapes) {
    for (const auto dtype :
         {zsvr::DType::kFloat32, zsvr::DType::kBFloat16, zsvr::DType::kFloat16}) {
      failures += check_search(shape, dtype, random) + check_score(shape, dtype, random);
    }
  }
  return failures;
}
