// Computes:  for every source token the site of the largest cosine in its window of the destination frame, and the cosine
//            between source tokens and bilinear samples of the destination.
// Tasks:     search: (frame pair, two grid rows), after the inverse lengths of f_dst (frame pair, block of sites); score:
//            (frame pair, block of sites). A task owns the sites it writes.
// Tiles:     2x2 queries at a time. If their windows nearly coincide (equal offsets: one column and one row more than a
//            window) they share each row of candidates: 4 queries x up to 6 cells are the accumulators, so 4 + 6 loads
//            feed up to 24 multiply-adds. Otherwise each query walks its own window, all four in step. Channels are in
//            lanes; a transposing sum leaves one dot product a lane, cell-major, where lanes then compete.
// Traffic:   f_src once; f_dst once for its lengths and, from the caches, once per pair of grid rows and row of the window.
//            Frame pairs are taken in groups that fit the last-level cache between the two passes.
// Numerics:  float32 sums in chains of 32 steps a lane and a fixed tree over lanes, the same on every path, so a cosine
//            does not depend on what it was computed beside. bf16 from avx512_bf16 on: products in pairs (vdpbf16ps).
#include "correspondence_search/correspondence_search.h"
#include "correspondence_search/lanes.h"
#include "trajectory_attention/cell.h"

namespace zsvr {
namespace ZSVR_ISA {
namespace {

using Search = CorrespondenceSearchParams;

constexpr int kQueries = 4;                     // upper left, upper right, lower left, lower right
constexpr int kCellsOfVec = kWidth / kQueries;  // a vector of dots is [cells][queries]
constexpr int kMostCells =
    kWidth >= 16 ? 6 : 2;  // a block of columns: kQueries * kMostCells sums in registers
constexpr int kLeastCells = kWidth >= 16 ? 4 : 2;
constexpr int64_t kGroupBytes = 8 << 20;  // features of the frame pairs between two passes
constexpr int64_t kLengthBlock = 128;     // sites of a task that computes lengths
constexpr int64_t kScoreBlock = 64;       // sites of a task that scores links

template <int kCells>
inline constexpr int kVecs = (kCells + kCellsOfVec - 1) / kCellsOfVec;

ZSVR_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ZSVR_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- lanes --------------------------------------------------------------------------------------

// The cell of each lane of vector v of a block of kCells; the last vector may hold its cells more than once.
template <int kCells>
ZSVR_INLINE VecInt cells_of(int v) {
  const int cells = kCells - v * kCellsOfVec < kCellsOfVec ? kCells - v * kCellsOfVec : kCellsOfVec;
  VecInt cell{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) {
    cell[lane] = v * kCellsOfVec + lane / kQueries % cells;
  }
  return cell;
}

ZSVR_INLINE VecInt query_of_lane() {
  VecInt query{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) query[lane] = lane % kQueries;
  return query;
}

// One value per query in the lanes of every cell.
ZSVR_INLINE VecInt of_queries(const int32_t (&x)[kQueries]) {
#if ZSVR_ISA_LEVEL >= 2
  return (VecInt)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#elif ZSVR_ISA_LEVEL == 1
  return (VecInt)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  VecInt result;
  std::memcpy(&result, x, 16);
  return result;
#endif
}

ZSVR_INLINE VecInt broadcast_int(int64_t x) { return static_cast<int32_t>(x) - VecInt{}; }

// lane n of the result is x[index[n]].
ZSVR_INLINE Vec pick(Vec x, VecInt index) {
#if ZSVR_ISA_LEVEL >= 2
  return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)x);
#elif ZSVR_ISA_LEVEL == 1
  return (Vec)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
#else
  Vec result;
  for (int lane = 0; lane < kWidth; ++lane) result[lane] = x[index[lane] & (kWidth - 1)];
  return result;
#endif
}

// The best candidate so far of every lane: the larger score wins, of equals the lower site; NaN never.
struct Best {
  Vec score;
  VecInt site;

  ZSVR_INLINE void meet(Vec s, VecInt at, VecInt valid) {
    const VecInt better = valid & ((s > score) | ((s == score) & (at < site)));
    score = better ? s : score;
    site = better ? at : site;
  }
};

// Lane n meets lane n ^ kStep.
template <int kStep>
ZSVR_INLINE void meet_across(Best* best) {
  if constexpr (kStep < kWidth) {
    Vec score = best->score;
    VecInt site = best->site;
#if defined(__clang__)
    for (int lane = 0; lane < kWidth; ++lane) {
      score[lane] = best->score[lane ^ kStep];
      site[lane] = best->site[lane ^ kStep];
    }
#else
    VecInt from{};
    for (int lane = 0; lane < kWidth; ++lane) from[lane] = lane ^ kStep;
    score = __builtin_shuffle(score, from);
    site = __builtin_shuffle(site, from);
#endif
    best->meet(score, site, broadcast_int(-1));
  }
}

// ---- dots ---------------------------------------------------------------------------------------

constexpr int kRightSkipsFirst = 1, kLeftSkipsLast = 2;  // columns outside the windows of one side

template <int kCells, int kSkips>
constexpr bool is_needed(int cell, int query) {
  if (query % 2 == 1 && cell == 0) return (kSkips & kRightSkipsFirst) == 0;
  if (query % 2 == 0 && cell == kCells - 1) return (kSkips & kLeftSkipsLast) == 0;
  return true;
}

// dots[cell, query] = query . cell. kShared: one row of cells for all queries, else one for each.
template <int kCells, int kSkips, bool kShared, class Scalar>
ZSVR_INLINE void dot_tile(const Scalar* const (&query)[kQueries],
                          const Scalar* const (&row)[kQueries], const int64_t* column, int64_t C,
                          Vec (&dots)[kVecs<kCells>]) {
  using Lane = Channels<Scalar>;
#pragma GCC unroll 2
  for (int v = 0; v < kVecs<kCells>; ++v) dots[v] = zero();
  for (int64_t begin = 0; begin < C; begin += kChain<Scalar>) {
    Vec sum[kCells * kQueries] = {};
    const auto add = [&](int64_t c, const auto& read) __attribute__((always_inline)) {
      typename Lane::Data q[kQueries];
#pragma GCC unroll 4
      for (int n = 0; n < kQueries; ++n) q[n] = read(query[n] + c);
#pragma GCC unroll 6
      for (int j = 0; j < kCells; ++j) {
        typename Lane::Data x;
        if constexpr (kShared) x = read(row[0] + column[j] + c);
#pragma GCC unroll 4
        for (int n = 0; n < kQueries; ++n) {
          if (!is_needed<kCells, kSkips>(j, n)) continue;
          if constexpr (!kShared) x = read(row[n] + column[j] + c);
          sum[j * kQueries + n] = Lane::add_product(x, q[n], sum[j * kQueries + n]);
        }
      }
    };
    const int64_t end = least(C, begin + kChain<Scalar>);
    int64_t c = begin;
    for (; c + Lane::kLanes <= end; c += Lane::kLanes) {
      add(c, [](const Scalar* x) __attribute__((always_inline)) { return Lane::whole(x); });
    }
    if (c < end) {
      const int count = static_cast<int>(end - c);
      add(c, [count](const Scalar* x)
                 __attribute__((always_inline)) { return Lane::first(x, count); });
    }
    constexpr int kWhole = kCells / kCellsOfVec, kRest = kCells % kCellsOfVec;
#pragma GCC unroll 2
    for (int v = 0; v < kWhole; ++v) dots[v] = dots[v] + sum_lanes<kWidth>(sum + v * kWidth);
    if constexpr (kRest > 0) {
      static_assert(kRest == 1 || kRest == 2);
      dots[kWhole] = dots[kWhole] + sum_lanes<kRest * kQueries>(sum + kWhole * kWidth);
    }
  }
}

// ---- windows ------------------------------------------------------------------------------------

// Sites x0..x1, y0..y1, inside the grid.
struct Window {
  int64_t x0, x1, y0, y1;
};

ZSVR_INLINE Window window_of(const Search& p, const int32_t* centre) {
  const int64_t x = most(0, least(centre[0], p.Wg - 1)), y = most(0, least(centre[1], p.Hg - 1));
  return {most(0, x - p.radius), least(p.Wg - 1, x + p.radius), most(0, y - p.radius),
          least(p.Hg - 1, y + p.radius)};
}

// Columns of a window in blocks of equal size.
struct Columns {
  int64_t blocks;
  int cells;

  explicit Columns(int64_t width) {
    blocks = (width + kMostCells - 1) / kMostCells;
    const int64_t equal = (width + blocks - 1) / blocks;
    cells = static_cast<int>(equal < kLeastCells ? kLeastCells : equal);
  }
  int64_t width() const { return blocks * cells; }
};

// Four queries, the rows they walk and where their columns start. Step k is row y[q] + k of each query, or where they
// are shared and `is_staggered` step 0 is the first row of the upper and the last row of the lower queries.
template <class Scalar>
struct Walk {
  const Scalar* query[kQueries];
  Window window[kQueries];
  int64_t x[kQueries], y[kQueries];
  int64_t steps;
  bool is_shared, is_staggered;
  Columns columns{1};
};

template <class Scalar>
ZSVR_INLINE void plan(const Search& p, Walk<Scalar>* walk) {
  const Window(&w)[kQueries] = walk->window;
  Window all = w[0];
  int64_t width = 0, height = 0;
#pragma GCC unroll 4
  for (int n = 0; n < kQueries; ++n) {
    all.x0 = least(all.x0, w[n].x0), all.x1 = most(all.x1, w[n].x1);
    all.y0 = least(all.y0, w[n].y0), all.y1 = most(all.y1, w[n].y1);
    width = most(width, w[n].x1 - w[n].x0 + 1), height = most(height, w[n].y1 - w[n].y0 + 1);
  }
  const bool staggered = w[0].y0 == w[1].y0 && w[0].y1 == w[1].y1 && w[2].y0 == w[3].y0 &&
                         w[2].y1 == w[3].y1 && w[2].y0 == w[0].y0 + 1 && w[2].y1 == w[0].y1 + 1;
  const Columns shared(all.x1 - all.x0 + 1), own(width);
  const int64_t shared_steps = all.y1 - all.y0 + 1 - (staggered ? 1 : 0);
  // Four rows of cells cost about as much again to load as to multiply.
  walk->is_shared = 2 * shared.width() * shared_steps <= 3 * own.width() * height;
  walk->is_staggered = walk->is_shared && staggered;
  walk->columns = walk->is_shared ? shared : own;
  walk->steps = walk->is_shared ? shared_steps : height;
  const int64_t last = most(0, p.Wg - walk->columns.width());
#pragma GCC unroll 4
  for (int n = 0; n < kQueries; ++n) {
    walk->x[n] = least(walk->is_shared ? all.x0 : w[n].x0, last);
    walk->y[n] = walk->is_shared ? all.y0 : w[n].y0;
  }
}

// One block of columns of all rows.
template <int kCells, int kSkips, class Scalar>
void search_block(const Search& p, int64_t n, const Walk<Scalar>& walk, int64_t first,
                  Vec inverse_src, Best* best) {
  const float* inverse = static_cast<const float*>(p.workspace) + n * p.Hg * p.Wg + first;
  int64_t column[kCells];
#pragma GCC unroll 6
  for (int j = 0; j < kCells; ++j) column[j] = least(first + j, p.Wg - 1) * p.f_dst.stride_p;
  int32_t low[kQueries], high[kQueries], corner[kQueries], left[kQueries], right[kQueries];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    const Window& w = walk.window[q];
    low[q] = static_cast<int32_t>(w.y0 - walk.y[q]);
    high[q] = static_cast<int32_t>(w.y1 - walk.y[q]);
    corner[q] = static_cast<int32_t>(walk.y[q] * p.Wg + walk.x[q] + first);
    left[q] = static_cast<int32_t>(w.x0 - walk.x[q] - first);
    right[q] = static_cast<int32_t>(w.x1 - walk.x[q] - first);
  }
  const VecInt lowest = of_queries(low), highest = of_queries(high);
  VecInt cell[kVecs<kCells>], site[kVecs<kCells>], inside[kVecs<kCells>];
  Best found[kVecs<kCells>];
#pragma GCC unroll 2
  for (int v = 0; v < kVecs<kCells>; ++v) {
    cell[v] = cells_of<kCells>(v);
    site[v] = cell[v] + of_queries(corner);
    inside[v] = (cell[v] >= of_queries(left)) & (cell[v] <= of_queries(right));
    found[v] = *best;
  }
  const auto compete = [&](const Vec(&dots)[kVecs<kCells>], const Vec(&inverse_dst)[kVecs<kCells>],
                           VecInt step, VecInt sites_before) __attribute__((always_inline)) {
    const VecInt in_rows = (step >= lowest) & (step <= highest);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs<kCells>; ++v) {
      found[v].meet(dots[v] * inverse_src * inverse_dst[v], site[v] + sites_before,
                    inside[v] & in_rows);
    }
  };
  // Every query meets a row of its own.
  const auto apart = [&](const int32_t (&step)[kQueries]) __attribute__((always_inline)) {
    const Scalar* row[kQueries];
    alignas(64) float lengths[kVecs<kCells> * kWidth];
    int32_t before[kQueries];
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const int64_t y = least(walk.y[q] + step[q], walk.window[q].y1);
      row[q] = p.f_dst.at<Scalar>(n, y * p.Wg + walk.x[q]);
      before[q] = static_cast<int32_t>(step[q] * p.Wg);
#pragma GCC unroll 6
      for (int j = 0; j < kCells; ++j) {
        lengths[j * kQueries + q] = inverse[y * p.Wg + walk.x[q] + j];
      }
    }
    Vec dots[kVecs<kCells>], inverse_dst[kVecs<kCells>];
    dot_tile<kCells, kSkips, false>(walk.query, row, column, p.C, dots);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs<kCells>; ++v) {
      inverse_dst[v] = load(lengths + v * kWidth);
      if (kCells - v * kCellsOfVec < kCellsOfVec) {  // its cells repeat
        inverse_dst[v] =
            pick(inverse_dst[v], (cell[v] - v * kCellsOfVec) * kQueries + query_of_lane());
      }
    }
    compete(dots, inverse_dst, of_queries(step), of_queries(before));
  };
  if (!walk.is_shared) {
    for (int64_t k = 0; k < walk.steps; ++k) {
      const int32_t step = static_cast<int32_t>(k);
      apart({step, step, step, step});
    }
  } else {
    int64_t begin = 0;
    if (walk.is_staggered) {
      const int32_t last = static_cast<int32_t>(walk.steps);
      apart({0, 0, last, last});
      begin = 1;
    }
    for (int64_t k = begin; k < walk.steps; ++k) {
      const int64_t y = walk.y[0] + k;
      const Scalar* row[kQueries] = {p.f_dst.at<Scalar>(n, y * p.Wg + walk.x[0])};
      Vec dots[kVecs<kCells>], inverse_dst[kVecs<kCells>];
      dot_tile<kCells, kSkips, true>(walk.query, row, column, p.C, dots);
      const Vec lengths = load(inverse + y * p.Wg + walk.x[0]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs<kCells>; ++v) inverse_dst[v] = pick(lengths, cell[v]);
      compete(dots, inverse_dst, broadcast_int(k), broadcast_int(k * p.Wg));
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVecs<kCells>; ++v) {
    best->meet(found[v].score, found[v].site, broadcast_int(-1));
  }
}

template <int kCells, class Scalar>
ZSVR_INLINE void search_columns(const Search& p, int64_t n, const Walk<Scalar>& walk, int64_t first,
                                Vec inverse_src, Best* best) {
  if constexpr (kWidth >= 16) {
    if (walk.is_shared) {
      const int64_t begin = walk.x[0] + first, end = begin + kCells - 1;
      const Window(&w)[kQueries] = walk.window;
      const bool right_skips = w[1].x0 > begin && w[3].x0 > begin;
      const bool left_skips = w[0].x1 < end && w[2].x1 < end;
      if (right_skips && left_skips)
        return search_block<kCells, 3>(p, n, walk, first, inverse_src, best);
      if (right_skips) return search_block<kCells, 1>(p, n, walk, first, inverse_src, best);
      if (left_skips) return search_block<kCells, 2>(p, n, walk, first, inverse_src, best);
    }
  }
  search_block<kCells, 0>(p, n, walk, first, inverse_src, best);
}

// Up to four queries: those of `sites`, of which the last may repeat.
template <class Scalar>
void search_quad(const Search& p, int64_t n, const int64_t (&sites)[kQueries]) {
  Walk<Scalar> walk;
  int32_t lowest[kQueries];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    walk.query[q] = p.f_src.at<Scalar>(n, sites[q]);
    walk.window[q] = window_of(p, p.centre + 2 * (n * p.Hg * p.Wg + sites[q]));
    lowest[q] = static_cast<int32_t>(walk.window[q].y0 * p.Wg + walk.window[q].x0);
  }
  plan(p, &walk);
  const Vec inverse_src = broadcast(1.0f) / length_of(squares_of(walk.query, p.C));
  Best best{broadcast(-__builtin_inff()), of_queries(lowest)};
  for (int64_t block = 0; block < walk.columns.blocks; ++block) {
    const int64_t first = block * walk.columns.cells;
    if constexpr (kWidth >= 16) {
      if (walk.columns.cells == 4) search_columns<4>(p, n, walk, first, inverse_src, &best);
      if (walk.columns.cells == 5) search_columns<5>(p, n, walk, first, inverse_src, &best);
      if (walk.columns.cells == 6) search_columns<6>(p, n, walk, first, inverse_src, &best);
    } else {
      search_columns<2>(p, n, walk, first, inverse_src, &best);
    }
  }
  meet_across<8>(&best);
  meet_across<4>(&best);
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    p.site[n * p.Hg * p.Wg + sites[q]] = best.site[q];
    p.score[n * p.Hg * p.Wg + sites[q]] = best.score[q];
  }
}

template <class Scalar>
void search_rows(const Search& p, int64_t n, int64_t y) {
  const int64_t below = least(y + 1, p.Hg - 1);
  for (int64_t x = 0; x < p.Wg; x += 2) {
    const int64_t beside = least(x + 1, p.Wg - 1);
    search_quad<Scalar>(p, n,
                        {y * p.Wg + x, y * p.Wg + beside, below * p.Wg + x, below * p.Wg + beside});
  }
}

// Inverse lengths of sites begin..end of frame n.
template <class Scalar>
void invert_lengths(const Search& p, int64_t n, int64_t begin, int64_t end) {
  float* inverse = static_cast<float*>(p.workspace) + n * p.Hg * p.Wg;
  for (int64_t site = begin; site < end; site += kWidth) {
    const int count = static_cast<int>(least(kWidth, end - site));
    const Scalar* row[kWidth / kRows][kRows];
    for (int i = 0; i < kWidth; ++i) {
      row[i / kRows][i % kRows] = p.f_dst.at<Scalar>(n, site + least(i, count - 1));
    }
    store_first(inverse + site, broadcast(1.0f) / length_of(squares_of(row, p.C)), count);
  }
}

template <class Scalar>
void run(const Search& p, const Executor& executor) {
  const int64_t P = p.Hg * p.Wg, pairs = (p.Hg + 1) / 2;
  const int64_t blocks = (P + kLengthBlock - 1) / kLengthBlock;
  const int64_t bytes = 2 * P * p.C * static_cast<int64_t>(sizeof(Scalar));
  const int64_t busy =
      (int64_t{4} * executor.threads + pairs - 1) / pairs;  // frames that occupy all workers
  const int64_t group = most(most(1, kGroupBytes / bytes), busy);
  for (int64_t from = 0; from < p.N; from += group) {
    const int64_t frames = least(group, p.N - from);
    run_tasks(executor, frames * blocks, [&](int64_t task, int) {
      const int64_t begin = task % blocks * kLengthBlock;
      invert_lengths<Scalar>(p, from + task / blocks, begin, least(begin + kLengthBlock, P));
    });
    run_tasks(executor, frames * pairs, [&](int64_t task, int) {
      search_rows<Scalar>(p, from + task / pairs, task % pairs * 2);
    });
  }
}

// ---- score --------------------------------------------------------------------------------------

// Adds up what one link needs: source . sample and |sample|^2.
template <int kCorners, class Scalar>
ZSVR_INLINE void add_sample(const Scalar* source, const Scalar* const* row, const float* weights,
                            int64_t C, Vec* dot, Vec* square) {
  Vec weight[kCorners];
#pragma GCC unroll 4
  for (int k = 0; k < kCorners; ++k) weight[k] = broadcast(weights[k]);
  Vec dots = zero(), lengths = zero();
  for (int64_t begin = 0; begin < C; begin += kChain<Scalar>) {
    Vec products = zero(), squares = zero();
    const auto add = [&](int64_t c, const auto& read) __attribute__((always_inline)) {
      Vec x = read(row[0] + c) * weight[0];
#pragma GCC unroll 4
      for (int k = 1; k < kCorners; ++k) x = fma(read(row[k] + c), weight[k], x);
      products = fma(x, read(source + c), products);
      squares = fma(x, x, squares);
    };
    const int64_t end = least(C, begin + kChain<Scalar>);
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) {
      add(c, [](const Scalar* x) __attribute__((always_inline)) { return load(x); });
    }
    if (c < end) {
      const int count = static_cast<int>(end - c);
      add(c, [count](const Scalar* x)
                 __attribute__((always_inline)) { return widen_first(x, count); });
    }
    dots = dots + products;
    lengths = lengths + squares;
  }
  *dot = dots;
  *square = lengths;
}

template <class Scalar>
void score_links(const LinkScoreParams& p, int64_t n, int64_t begin, int64_t end) {
  const int64_t P = p.Hg * p.Wg;
  for (int64_t site = begin; site < end; site += kQueries) {
    const int count = static_cast<int>(least(kQueries, end - site));
    const Scalar* source[kQueries];
    Vec dot[kQueries], square[kQueries];
    for (int q = 0; q < kQueries; ++q) {
      const int64_t at = site + least(q, count - 1);
      source[q] = p.f_src.at<Scalar>(n, at);
      Cell cell = cell_of(p.positions + 2 * (n * P + at), p.Hg, p.Wg);
      const Scalar* row[4];
      for (int k = 0; k < cell.corners; ++k) {
        // A product of two tiny fractions may be zero: what lies there takes no part.
        row[k] = p.f_dst.at<Scalar>(n, cell.site[cell.weight[k] > 0.0f ? k : 0]);
      }
      if (cell.corners == 4) {
        add_sample<4>(source[q], row, cell.weight, p.C, &dot[q], &square[q]);
      } else if (cell.corners == 2) {
        add_sample<2>(source[q], row, cell.weight, p.C, &dot[q], &square[q]);
      } else {
        add_sample<1>(source[q], row, cell.weight, p.C, &dot[q], &square[q]);
      }
    }
    const Vec lengths = length_of(squares_of(source, p.C)) * length_of(sum_lanes<kQueries>(square));
    store_first(p.score + n * P + site, sum_lanes<kQueries>(dot) / lengths, count);
  }
}

template <class Scalar>
void run(const LinkScoreParams& p, const Executor& executor) {
  const int64_t P = p.Hg * p.Wg, blocks = (P + kScoreBlock - 1) / kScoreBlock;
  run_tasks(executor, p.N * blocks, [&](int64_t task, int) {
    const int64_t begin = task % blocks * kScoreBlock;
    score_links<Scalar>(p, task / blocks, begin, least(begin + kScoreBlock, P));
  });
}

template <class Params>
Status launch(const Params& params, const Executor& executor) {
  by_dtype(params.dtype, [&](auto value) { run<decltype(value)>(params, executor); });
  return ok_status();
}

}  // namespace

Status correspondence_search(const CorrespondenceSearchParams& params, const Executor& executor) {
  return launch(params, executor);
}

Status link_score(const LinkScoreParams& params, const Executor& executor) {
  return launch(params, executor);
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
