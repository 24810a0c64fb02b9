#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "threads.h"
#include "vector_portable.h"

namespace pymllm {
namespace {

#include "sampling_kernel.h"

// Values that are worth a thread: half a millisecond's. Where a processor is busy, a join may cost a time slice.
constexpr std::int64_t kValuesWorthAThread = 512 * 1024;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int threads_for(std::int64_t rows, std::int64_t vocabulary, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(rows * vocabulary / kValuesWorthAThread, 1, std::max(threads, 1)));
}

const SamplingPath &path_of(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == Isa::avx512_vnni) return sampling_avx512();
  if (isa == Isa::avx2 || isa == Isa::avx2_vnni) return sampling_avx2();
#endif
#if defined(PYMLLM_NEON_DOTPROD)
  if (isa == Isa::neon_dotprod) return sampling_neon();
#endif
  (void)isa;
  return sampling_portable();
}

// The memory of a thread, which outlives a call.
struct Work {
  std::vector<float> values, maxima, sums, exponents, weights, keys, order;
  std::vector<std::int32_t> ids, indices;
  std::vector<char> edited;
};

Work &work_of_thread() {
  static thread_local Work work;
  return work;
}

template <class T> T *at_least(std::vector<T> &memory, std::int64_t count) {
  if (static_cast<std::int64_t>(memory.size()) < count) memory.resize(static_cast<std::size_t>(count));
  return memory.data();
}

// A row and the largest value of each of its pieces. most: the largest of all; not finite: the row is no good.
struct Row {
  const SamplingPath &path;
  Work &work;
  const float *values;
  std::int64_t size, pieces;
  float most = -kInfinity;

  // copied: the values are a copy, which may be changed.
  Row(const SamplingPath &path, Work &work, const float *logits, std::int64_t size, bool copied)
      : path(path), work(work), values(copied ? at_least(work.values, size) : logits), size(size),
        pieces((size + kPiece - 1) / kPiece) {
    const bool nan = path.maxima(logits, size, at_least(work.maxima, pieces), copied ? work.values.data() : nullptr);
    find_most();
    if (nan) most = kNaN;
  }
  void find_most() {
    for (std::int64_t p = 0; p < pieces; ++p) most = std::max(most, work.maxima[p]);
  }
  std::int64_t end_of(std::int64_t piece) const { return std::min((piece + 1) * kPiece, size); }
};

// Change the logits that biases and penalties name; the row is a copy.
void edit(Row &row, const SamplingBatch &batch, std::int64_t r) {
  Work &work = row.work;
  const RowSettings &s = batch.settings[r];
  const std::int64_t bias_begin = batch.bias_starts[r], bias_end = batch.bias_starts[r + 1];
  const std::int64_t seen_begin = batch.seen_starts[r], seen_end = batch.seen_starts[r + 1];
  float *values = work.values.data();
  char *edited = at_least(work.edited, row.pieces);
  std::fill(edited, edited + row.pieces, char{0});
  for (std::int64_t i = bias_begin; i < bias_end; ++i) {
    values[batch.bias_tokens[i]] += batch.bias_values[i];
    edited[batch.bias_tokens[i] / kPiece] = 1;
  }
  const double factors[2] = {s.repetition, 1 / s.repetition}, presence[2] = {0, s.presence};
  for (std::int64_t i = seen_begin; i < seen_end; ++i) {
    // Without branches: signs come as they like.
    const double value = values[batch.seen_tokens[i]], count = batch.seen_counts[i];
    const double changed = value * factors[value > 0] - (s.frequency * count + presence[count > 0]);
    values[batch.seen_tokens[i]] = static_cast<float>(changed);
    edited[batch.seen_tokens[i] / kPiece] = 1;
  }
  for (std::int64_t p = 0; p < row.pieces; ++p)
    if (edited[p]) row.path.maxima(values + p * kPiece, row.end_of(p) - p * kPiece, work.maxima.data() + p, nullptr);
  row.most = -kInfinity;
  row.find_most();
}

// A value that at least `count` values of the row reach: each piece whose largest reaches it has one. Few more do.
float reached_by(const Row &row, std::int64_t count) {
  if (count > row.pieces) return -kInfinity;
  float *order = at_least(row.work.order, row.pieces);
  std::copy_n(row.work.maxima.data(), row.pieces, order);
  std::nth_element(order, order + (count - 1), order + row.pieces, std::greater<float>());
  return order[count - 1];
}

float kth_largest(const Row &row, std::int64_t k) {
  const float bound = reached_by(row, k);
  float *order = at_least(row.work.order, row.size);
  std::int64_t count = 0;
  for (std::int64_t p = 0; p < row.pieces; ++p) {
    if (row.work.maxima[p] < bound) continue;
    for (std::int64_t i = p * kPiece; i < row.end_of(p); ++i) {
      order[count] = row.values[i];
      count += row.values[i] >= bound;
    }
  }
  std::nth_element(order, order + (k - 1), order + count, std::greater<float>());
  return order[k - 1];
}

// The tokens that are left, in their order, with (value - most) * scale and the weight of each.
struct Candidates {
  std::int32_t *ids;
  float *exponents, *weights;
  std::int64_t count = 0;

  Candidates(const Row &row, float scale, float least)
      : ids(at_least(row.work.ids, row.size + 1)), exponents(at_least(row.work.exponents, row.size + 1)),
        weights(at_least(row.work.weights, row.size + 1)) {
    for (std::int64_t p = 0; p < row.pieces; ++p) {
      if ((row.work.maxima[p] - row.most) * scale < least) continue;
      for (std::int64_t i = p * kPiece; i < row.end_of(p); ++i) {
        const float x = (row.values[i] - row.most) * scale;
        ids[count] = static_cast<std::int32_t>(i);
        exponents[count] = x;
        count += x >= least;
      }
    }
    row.path.weigh(exponents, count, 0.0f, 1.0f, weights);
  }
  double sum() const {
    double total = 0;
    for (std::int64_t i = 0; i < count; ++i) total += weights[i];
    return total;
  }
  template <class Kept> void keep(const Kept &kept) {
    std::int64_t left = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      if (!kept(i)) continue;
      ids[left] = ids[i];
      exponents[left] = exponents[i];
      weights[left++] = weights[i];
    }
    count = left;
  }
};

// Where a walk over the candidates, the smallest key first, has passed the weight `mass`: the last key that it needs, and
// how many candidates with just that key.
struct Cut {
  float key = kInfinity;
  std::int64_t equal = 0;
};

constexpr std::int64_t kSorted = 2048; // that many are sorted at once; of more, first a bin is found
constexpr int kBins = 1024;
constexpr float kBinsToOne = 32.0f;

Cut find_cut(const float *keys, const Candidates &left, double mass, Work &work) {
  std::int32_t *indices = at_least(work.indices, left.count);
  std::int64_t members = 0;
  double before = 0;
  if (left.count <= kSorted) {
    for (; members < left.count; ++members) indices[members] = static_cast<std::int32_t>(members);
  } else {
    const auto bin_of = [](float key) { return static_cast<int>(std::min(key * kBinsToOne, kBins - 1.0f)); };
    double masses[kBins] = {};
    for (std::int64_t i = 0; i < left.count; ++i) masses[bin_of(keys[i])] += left.weights[i];
    int bin = 0;
    while (bin < kBins - 1 && before + masses[bin] < mass) before += masses[bin++];
    for (std::int64_t i = 0; i < left.count; ++i)
      if (bin_of(keys[i]) == bin) indices[members++] = static_cast<std::int32_t>(i);
  }
  std::sort(indices, indices + members, [&](std::int32_t a, std::int32_t b) {
    return keys[a] != keys[b] ? keys[a] < keys[b] : a < b;
  });
  Cut cut;
  for (std::int64_t i = 0; i < members && before < mass; ++i) {
    const float key = keys[indices[i]];
    cut.equal = key == cut.key ? cut.equal + 1 : 1;
    cut.key = key;
    before += left.weights[indices[i]];
  }
  return cut;
}

void cut_top_p(Candidates &left, double mass, Work &work) {
  float *keys = at_least(work.keys, left.count);
  for (std::int64_t i = 0; i < left.count; ++i) keys[i] = -left.exponents[i];
  Cut cut = find_cut(keys, left, mass, work);
  left.keep([&](std::int64_t i) { return keys[i] < cut.key || (keys[i] == cut.key && cut.equal-- > 0); });
}

// Keep the tokens whose information is nearest to what is expected of all that are left.
void cut_typical(Candidates &left, double share, Work &work) {
  float *keys = at_least(work.keys, left.count);
  const double total = left.sum(), log_total = std::log(total);
  double entropy = 0;
  for (std::int64_t i = 0; i < left.count; ++i) entropy -= left.weights[i] / total * (left.exponents[i] - log_total);
  for (std::int64_t i = 0; i < left.count; ++i)
    keys[i] = static_cast<float>(std::fabs(log_total - left.exponents[i] - entropy));
  const Cut cut = find_cut(keys, left, share * total, work);
  left.keep([&](std::int64_t i) { return keys[i] <= cut.key; });
}

// A race: entrant i arrives after an exponential time with the rate of its weight, and the first one wins, by chances
// like the weights. Its time follows from the row's number and from i alone, so that rounding of weights moves a winner
// only where two arrive together.
struct Race {
  std::uint64_t state; // of the row and of what races: 1 pieces, 2 tokens
  double best = kNever;
  std::int64_t winner = 0;

  static constexpr double kNever = std::numeric_limits<double>::infinity();

  Race(double number, std::uint64_t what)
      : state(mixed(static_cast<std::uint64_t>(number * 0x1p53) * 4 + what)) {}

  static std::uint64_t mixed(std::uint64_t z) { // SplitMix64's finaliser
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  void enter(std::int64_t i, double weight) {
    if (!(weight > 0)) return;
    const std::uint64_t z = mixed(state + static_cast<std::uint64_t>(i + 1) * 0x9E3779B97F4A7C15u);
    const double u = (static_cast<double>(z >> 11) + 0.5) * 0x1p-53;
    if (1 - u > best * weight) return; // -log(u) is at least 1 - u
    const double time = -std::log(u) / weight;
    if (time < best) {
      best = time;
      winner = i;
    }
  }
};

// A token, and its probability among those that it was chosen from.
struct Choice {
  std::int64_t token = -1;
  double chance = std::numeric_limits<double>::quiet_NaN();
};

// Draw from some tokens, in their order: their pieces race, then the tokens of the winner.
Choice draw(const std::int32_t *ids, const float *weights, std::int64_t count, double number) {
  Race pieces(number, 1), tokens(number, 2);
  double total = 0, winner = 0;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t piece = ids[i] / kPiece;
    double sum = 0;
    for (; i < count && ids[i] / kPiece == piece; ++i) sum += weights[i];
    pieces.enter(piece, sum);
    total += sum;
  }
  const auto *first = std::lower_bound(ids, ids + count, static_cast<std::int32_t>(pieces.winner * kPiece));
  for (std::int64_t i = first - ids; i < count && ids[i] / kPiece == pieces.winner; ++i) {
    tokens.enter(ids[i], weights[i]);
    if (tokens.winner == ids[i]) winner = weights[i];
  }
  return {tokens.winner, winner / total};
}

double total_of(const Row &row) {
  double total = 0;
  for (std::int64_t p = 0; p < row.pieces; ++p) total += row.work.sums[p];
  return total;
}

// Draw from all tokens, of whose pieces the sums are known.
Choice draw_from_all(const Row &row, float scale, double number) {
  Race pieces(number, 1), tokens(number, 2);
  for (std::int64_t p = 0; p < row.pieces; ++p) pieces.enter(p, row.work.sums[p]);
  float weights[kPiece];
  const std::int64_t begin = pieces.winner * kPiece, count = row.end_of(pieces.winner) - begin;
  row.path.weigh(row.values + begin, count, row.most, scale, weights);
  for (std::int64_t i = 0; i < count; ++i) tokens.enter(begin + i, weights[i]);
  return {tokens.winner, weights[tokens.winner - begin] / total_of(row)};
}

// A weight such that all tokens with less have less than `mass` together: in a piece they have at most so much each, and
// no more than its sum.
double least_weight(const Row &row, double mass) {
  double weight = mass / static_cast<double>(row.size);
  for (int step = 0; step < 16; ++step) {
    const auto most = static_cast<float>(weight * 4 * kPiece);
    double sum = 0;
    for (std::int64_t p = 0; p < row.pieces; ++p) sum += std::min(row.work.sums[p], most);
    if (sum >= mass) break;
    weight *= 4;
  }
  return weight;
}

// with_chance: whether the chance is wanted of a likeliest token, too, for which the whole row has to be summed.
Choice choose(const SamplingPath &path, const SamplingBatch &batch, std::int64_t r, bool with_chance, Work &work) {
  const bool edits = batch.bias_starts[r] < batch.bias_starts[r + 1] || batch.seen_starts[r] < batch.seen_starts[r + 1];
  Row row(path, work, batch.logits + r * batch.stride, batch.vocabulary, edits);
  if (!(row.most < kInfinity)) return {};
  if (edits) edit(row, batch, r);
  if (!std::isfinite(row.most)) return {};
  const RowSettings &s = batch.settings[r];
  if (s.temperature == 0) {
    const auto piece = std::find(work.maxima.data(), work.maxima.data() + row.pieces, row.most) - work.maxima.data();
    const float *begin = row.values + piece * kPiece;
    Choice likeliest{std::find(begin, row.values + row.end_of(piece), row.most) - row.values};
    if (with_chance) {
      path.sums(row.values, row.size, row.most, 1.0f, at_least(work.sums, row.pieces));
      likeliest.chance = 1 / total_of(row);
    }
    return likeliest;
  }
  const auto scale = static_cast<float>(std::min(1 / s.temperature, 3e38));
  float least = kLeastExponent;
  if (s.min_p > 0) least = std::max(least, static_cast<float>(std::log(s.min_p)));
  if (s.top_k > 0 && s.top_k < static_cast<double>(row.size))
    least = std::max(least, (kth_largest(row, static_cast<std::int64_t>(s.top_k)) - row.most) * scale);
  const bool all = least == kLeastExponent;
  double total = 0;
  if (all && (s.top_p < 1 || s.typical_p >= 1)) {
    path.sums(row.values, row.size, row.most, scale, at_least(work.sums, row.pieces));
    if (s.top_p >= 1) return draw_from_all(row, scale, s.number);
    total = total_of(row);
    least = std::max(least, static_cast<float>(std::log(least_weight(row, (1 - s.top_p) * 0.99 * total))));
  }
  Candidates left(row, scale, least);
  if (s.top_p < 1) cut_top_p(left, s.top_p * (all ? total : left.sum()), work);
  if (s.typical_p < 1) cut_typical(left, s.typical_p, work);
  return draw(left.ids, left.weights, left.count, s.number);
}

void describe(const SamplingPath &path, const float *logits, std::int64_t vocabulary, std::int64_t token,
              std::int64_t count, float *chosen, std::int64_t *best, float *values, Work &work) {
  const Row row(path, work, logits, vocabulary, false);
  if (!std::isfinite(row.most)) {
    *chosen = kNaN;
    std::fill_n(best, count, std::int64_t{0});
    std::fill_n(values, count, kNaN);
    return;
  }
  path.sums(row.values, row.size, row.most, 1.0f, at_least(work.sums, row.pieces));
  const double log_total = row.most + std::log(total_of(row));
  *chosen = static_cast<float>(logits[token] - log_total);
  if (count == 0) return;
  const float bound = reached_by(row, count);
  std::int32_t *ids = at_least(work.ids, row.size + 1);
  std::int64_t found = 0;
  for (std::int64_t p = 0; p < row.pieces; ++p) {
    if (work.maxima[p] < bound) continue;
    for (std::int64_t i = p * kPiece; i < row.end_of(p); ++i) {
      ids[found] = static_cast<std::int32_t>(i);
      found += logits[i] >= bound;
    }
  }
  std::partial_sort(ids, ids + count, ids + found, [&](std::int32_t a, std::int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  for (std::int64_t i = 0; i < count; ++i) {
    best[i] = ids[i];
    values[i] = static_cast<float>(logits[ids[i]] - log_total);
  }
}

} // namespace

const SamplingPath &sampling_portable() { return kSampling; }

void choose_tokens(const SamplingBatch &batch, std::int64_t *tokens, double *chances, Isa isa, int threads) {
  const SamplingPath &path = path_of(isa);
  const auto body = [&](std::int64_t begin, std::int64_t end) {
    Work &work = work_of_thread();
    for (std::int64_t r = begin; r < end; ++r) {
      const Choice choice = choose(path, batch, r, chances != nullptr, work);
      tokens[r] = choice.token;
      if (chances != nullptr) chances[r] = choice.chance;
    }
  };
  // Rows take unequal times.
  parallel_for(batch.rows, threads_for(batch.rows, batch.vocabulary, threads), body, 1);
}

void log_probabilities(const float *logits, std::int64_t rows, std::int64_t vocabulary, std::int64_t stride,
                       const std::int64_t *tokens, std::int64_t count, float *chosen, std::int64_t *best,
                       float *values, Isa isa, int threads) {
  const SamplingPath &path = path_of(isa);
  const auto body = [&](std::int64_t begin, std::int64_t end) {
    Work &work = work_of_thread();
    for (std::int64_t r = begin; r < end; ++r)
      describe(path, logits + r * stride, vocabulary, tokens[r], count, chosen + r, best + r * count,
               values + r * count, work);
  };
  parallel_for(rows, threads_for(rows, vocabulary, threads), body, 1);
}

} // namespace pymllm
