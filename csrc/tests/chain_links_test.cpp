// Chaining: constant motion, thread independence, and links that point anywhere.
#include "chain_links/chain_links.h"

#include "tests/oracle.h"

namespace zsvr::test {
namespace {

struct Result {
  std::vector<float> positions;
  std::vector<uint8_t> valid;
};

Result chain(int64_t T, int64_t Hg, int64_t Wg, int64_t window, const std::vector<float>& forward,
             const std::vector<float>& backward, const std::vector<uint8_t>& valid, bool corners,
             int threads) {
  const int64_t L = window < 0 ? T : 2 * window + 1;
  Result result;
  result.positions.assign(static_cast<size_t>(2 * T * L * Hg * Wg), NAN);
  result.valid.assign(static_cast<size_t>(T * L * Hg * Wg), 7);
  ChainLinksParams p;
  p.B = 1, p.T = T, p.Hg = Hg, p.Wg = Wg, p.window = window, p.check_corners = corners;
  p.forward = forward.data(), p.backward = backward.data();
  p.valid_forward = p.valid_backward = valid.data();
  p.positions = result.positions.data(), p.valid = result.valid.data();
  if (!chain_links(p, executor_of(threads)).ok()) result.valid.clear();
  return result;
}

int check_constant_motion() {
  const int64_t T = 4, Hg = 5, Wg = 7, P = Hg * Wg;
  std::vector<float> forward, backward;
  for (int64_t i = 0; i < T - 1; ++i)
    for (int64_t p = 0; p < P; ++p) {
      const float x = static_cast<float>(p % Wg), y = static_cast<float>(p / Wg);
      forward.insert(forward.end(), {x + 1.0f, y - 0.5f});
      backward.insert(backward.end(), {x - 1.0f, y + 0.5f});
    }
  const std::vector<uint8_t> valid(static_cast<size_t>((T - 1) * P), 1);
  const Result result = chain(T, Hg, Wg, -1, forward, backward, valid, false, 2);
  int failures = expect(!result.valid.empty(), "status");
  for (int64_t i = 0; i < T && failures == 0; ++i)
    for (int64_t j = 0; j < T; ++j)
      for (int64_t p = 0; p < P; ++p) {
        const float x = static_cast<float>(p % Wg + (j - i));
        const float y = static_cast<float>(p / Wg) - 0.5f * static_cast<float>(j - i);
        const bool inside = x >= -0.5f && x <= Wg - 0.5f && y >= -0.5f && y <= Hg - 0.5f;
        const size_t at = static_cast<size_t>((i * T + j) * P + p);
        failures += expect((result.valid[at] != 0) == inside, "validity of constant motion");
        if (inside) {
          failures += expect(result.positions[2 * at] == x && result.positions[2 * at + 1] == y,
                             "positions of constant motion");
        }
      }
  return failures;
}

int check_wild_links() {
  const int64_t T = 5, Hg = 3, Wg = 4, P = Hg * Wg;
  std::mt19937 random(4);
  const float wild[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 0.0f, 1.5f, 2.0f};
  std::vector<float> forward, backward;
  std::vector<uint8_t> valid;
  for (int64_t n = 0; n < (T - 1) * P; ++n) {
    forward.insert(forward.end(), {wild[random() % 8], wild[random() % 8]});
    backward.insert(backward.end(), {wild[random() % 8], wild[random() % 8]});
    valid.push_back(random() % 5 != 0);
  }
  int failures = 0;
  for (const int64_t window : {-1, 0, 1, 9})
    for (const bool corners : {false, true}) {
      const Result one = chain(T, Hg, Wg, window, forward, backward, valid, corners, 1);
      const Result many = chain(T, Hg, Wg, window, forward, backward, valid, corners, 4);
      failures +=
          expect(one.valid == many.valid && one.positions == many.positions, "threads agree");
      for (const float x : one.positions)
        failures += expect(std::isfinite(x), "positions are finite");
      for (const uint8_t x : one.valid) failures += expect(x <= 1, "validity is written");
    }
  return failures;
}

}  // namespace
}  // namespace zsvr::test

int test_chain_links() {
  return zsvr::test::check_constant_motion() + zsvr::test::check_wild_links();
}
