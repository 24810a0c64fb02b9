#include "integer_experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "integer_block.h"
#include "scratch.h"
#include "threads.h"

namespace pymllm::integer {
namespace {

// Rows of one expert that go through a product together.
struct Job {
  std::int64_t expert;
  std::int64_t first, rows;  // sorted slots
  int slices;
};

// Slots sorted by expert, those of one expert in order of tokens.
struct Sorted {
  std::vector<std::int64_t> slots;      // [n]: token * K + k
  std::vector<std::int64_t> positions;  // [S]: where a slot stands; -1: nowhere
  std::vector<Job> jobs;
};

Sorted sort_slots(const Routing &routing, std::int64_t experts, const Exactness &exactness) {
  const std::int64_t all = routing.tokens * routing.top_k;
  std::vector<std::int64_t> starts(static_cast<std::size_t>(experts) + 1, 0);
  for (std::int64_t i = 0; i < all; ++i)
    if (routing.ids[i] >= 0) ++starts[static_cast<std::size_t>(routing.ids[i]) + 1];
  Sorted sorted;
  for (std::int64_t e = 0; e < experts; ++e) {
    const std::int64_t rows = starts[static_cast<std::size_t>(e) + 1], first = starts[static_cast<std::size_t>(e)];
    starts[static_cast<std::size_t>(e) + 1] += first;
    if (rows == 0) continue;
    const int slices = rows <= exactness.exact_tokens ? exactness.exact_slices : 1;
    const std::int64_t parts = (rows * slices + kRowsAtATime - 1) / kRowsAtATime;
    for (std::int64_t i = 0; i < parts; ++i) {
      const std::int64_t begin = rows * i / parts, end = rows * (i + 1) / parts;
      sorted.jobs.push_back({e, first + begin, end - begin, slices});
    }
  }
  sorted.slots.resize(static_cast<std::size_t>(starts.back()));
  sorted.positions.assign(static_cast<std::size_t>(all), -1);
  for (std::int64_t i = 0; i < all; ++i) {
    if (routing.ids[i] < 0) continue;
    const std::int64_t at = starts[static_cast<std::size_t>(routing.ids[i])]++;
    sorted.slots[static_cast<std::size_t>(at)] = i;
    sorted.positions[static_cast<std::size_t>(i)] = at;
  }
  return sorted;
}

// All jobs' row blocks, in one parallel loop. y: [slots, O] float32.
void multiply_jobs(const Kernels &kernels, const Product &product, const std::vector<Job> &jobs,
                   const std::vector<Activations> &activations, float *y, int threads) {
  const Weights &shape = product.first;
  const std::int64_t outputs = shape.out_features, row_blocks = shape.row_blocks();
  const std::int64_t steps = (row_blocks + kStepBlocks - 1) / kStepBlocks;
  std::int64_t work = 0, rows = 0;
  bool even = true;
  for (const Job &job : jobs) {
    work += std::max(row_blocks * shape.groups() * shape.block_bytes(),
                     job.rows * job.slices * shape.in_features * outputs / 16);
    rows += job.rows;
    even = even && job.rows == jobs[0].rows;
  }
  const auto count = static_cast<std::int64_t>(jobs.size());
  const Team team = worthwhile_threads(work, threads);
  // Experts with few rows more than others: smaller pieces, for whichever thread comes free.
  const std::int64_t piece = even || team == 1 ? 0 : std::max<std::int64_t>(2, count * steps / (team * 16));
  parallel_for(
      count * steps, team,
      [&](std::int64_t first, std::int64_t last) {
        thread_local Scratch scratch, biases;
        for (std::int64_t at = first; at < last;) {
          const std::int64_t index = at / steps, step = at - index * steps;
          const std::int64_t some = std::min(last - at, steps - step);
          const Job &job = jobs[static_cast<std::size_t>(index)];
          const Activations &x = activations[static_cast<std::size_t>(index)];
          const float *bias = nullptr;
          if (product.bias != nullptr) {
            float *floats = biases.floats(outputs);
            for (std::int64_t i = 0; i < outputs; ++i)
              floats[i] = read_float(product.bias, product.bias_dtype, job.expert * outputs + i);
            bias = floats;
          }
          const std::int64_t begin = step * kStepBlocks, end = std::min((step + some) * kStepBlocks, row_blocks);
          kernels.multiply(product.of(job.expert), x, {FloatType::f32, job.rows, nullptr, bias, y + job.first * outputs},
                           begin, end, scratch.at_least(kernels.scratch_bytes(shape, x.rows, end - begin)));
          at += some;
        }
      },
      piece);
}

// Rows of `from`, which has all tokens, in the order of a job's slots.
void pick_rows(const Activations &from, const std::int64_t *slots, std::int64_t top_k, const Weights &weights,
               const Activations &to) {
  const std::int64_t group = weights.group, slices = to.slices, rows = to.rows / slices;
  for (std::int64_t g = 0; g < weights.groups(); ++g)
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t source = g * from.rows + slots[i] / top_k * slices, target = g * to.rows + i * slices;
      std::memcpy(to.codes + target * group, from.codes + source * group, static_cast<std::size_t>(slices * group));
      std::memcpy(to.scales + target, from.scales + source, static_cast<std::size_t>(slices) * 4);
      std::memcpy(to.negative_sums + target, from.negative_sums + source, static_cast<std::size_t>(slices) * 4);
    }
}

std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory for the activations of every job.
std::vector<Activations> activations_of(const Weights &weights, const std::vector<Job> &jobs, Scratch &scratch) {
  std::size_t bytes = 0;
  for (const Job &job : jobs) bytes += aligned(activation_bytes(weights, job.rows * job.slices));
  std::uint8_t *memory = scratch.at_least(bytes);
  std::vector<Activations> found;
  for (const Job &job : jobs) {
    found.push_back(activations_in(memory, weights, job.rows * job.slices, job.slices));
    memory += aligned(activation_bytes(weights, job.rows * job.slices));
  }
  return found;
}

// x as every job needs it: tokens are quantised once for each number of slices, and copied to the jobs they are in.
std::vector<Activations> quantise_tokens(const Kernels &kernels, const Weights &weights, const Floats &x,
                                         const Routing &routing, const Sorted &sorted, const Exactness &exactness,
                                         int threads) {
  thread_local Scratch all[2], picked;
  std::vector<Activations> found;
  // Decoding: all experts take the one token as it is, unless one came up twice.
  const bool single = routing.tokens == 1 && std::all_of(sorted.jobs.begin(), sorted.jobs.end(),
                                                         [](const Job &job) { return job.rows == 1; });
  if (!single) found = activations_of(weights, sorted.jobs, picked);
  for (const bool exact : {true, false}) {
    const int slices = exact ? exactness.exact_slices : 1;
    const auto wanted = [&](const Job &job) { return job.slices == slices; };
    if (!std::any_of(sorted.jobs.begin(), sorted.jobs.end(), wanted)) continue;
    const std::int64_t rows = x.tokens * slices;
    const Activations tokens =
        activations_in(all[exact].at_least(activation_bytes(weights, rows)), weights, rows, slices);
    const Team team = worthwhile_threads(rows * weights.in_features * 2, threads);
    parallel_for(weights.groups(), team, [&](std::int64_t first, std::int64_t last) {
      kernels.quantise(x, weights, tokens, first, last);
    });
    if (single) return std::vector<Activations>(sorted.jobs.size(), tokens);
    parallel_for(
        static_cast<std::int64_t>(sorted.jobs.size()), team,
        [&](std::int64_t first, std::int64_t last) {
          for (std::int64_t i = first; i < last; ++i) {
            const Job &job = sorted.jobs[static_cast<std::size_t>(i)];
            if (wanted(job))
              pick_rows(tokens, sorted.slots.data() + job.first, routing.top_k, weights,
                        found[static_cast<std::size_t>(i)]);
          }
        },
        1);
    if (exactness.exact_slices == 1) break;
  }
  return found;
}

// y[t] = sum over k of weight * answers, in order of k.
void combine(const Routing &routing, const Sorted &sorted, const float *answers, std::int64_t size, FloatType dtype,
             void *y, int threads) {
  parallel_for(routing.tokens, worthwhile_threads(routing.tokens * routing.top_k * size * 4, threads),
               [&](std::int64_t first, std::int64_t last) {
                 thread_local Scratch scratch;
                 float *sums = scratch.floats(size);
                 for (std::int64_t token = first; token < last; ++token) {
                   std::fill(sums, sums + size, 0.0f);
                   for (std::int64_t slot = token * routing.top_k; slot < (token + 1) * routing.top_k; ++slot) {
                     const std::int64_t at = sorted.positions[static_cast<std::size_t>(slot)];
                     if (at < 0) continue;
                     const float weight = routing.weights[slot], *answer = answers + at * size;
                     for (std::int64_t i = 0; i < size; ++i) sums[i] += weight * answer[i];
                   }
                   for (std::int64_t i = 0; i < size; ++i) write_float(sums[i], y, dtype, token * size + i);
                 }
               });
}

} // namespace

void experts(const Experts &experts, const Routing &routing, FloatType dtype, const void *x, void *y,
             const Exactness &exactness, int threads, Isa isa) {
  const Kernels &kernels = kernels_of(isa);
  const Weights &gate_up = experts.gate_up.first, &down = experts.down.first;
  const std::int64_t hidden = down.out_features, intermediate = gate_up.out_features / 2;
  const Sorted sorted = sort_slots(routing, experts.count, exactness);
  const auto slots = static_cast<std::int64_t>(sorted.slots.size());

  thread_local Scratch between, codes;
  const std::int64_t widest = std::max(2 * intermediate, hidden);
  float *answers = between.floats(slots * (widest + intermediate));
  float *gated = answers + slots * widest;

  const Floats tokens{dtype, routing.tokens, x, nullptr, nullptr};
  multiply_jobs(kernels, experts.gate_up, sorted.jobs,
                quantise_tokens(kernels, gate_up, tokens, routing, sorted, exactness, threads), answers, threads);
  gate_and_multiply(answers, gated, experts.gate, slots, intermediate, isa, threads);

  const std::vector<Activations> activations = activations_of(down, sorted.jobs, codes);
  parallel_for(
      static_cast<std::int64_t>(sorted.jobs.size()), worthwhile_threads(slots * intermediate * 4, threads),
      [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) {
          const Job &job = sorted.jobs[static_cast<std::size_t>(i)];
          const Floats rows{FloatType::f32, job.rows, gated + job.first * intermediate, nullptr, nullptr};
          kernels.quantise(rows, down, activations[static_cast<std::size_t>(i)], 0, down.groups());
        }
      },
      1);
  multiply_jobs(kernels, experts.down, sorted.jobs, activations, answers, threads);
  combine(routing, sorted, answers, hidden, dtype, y, threads);
}

} // namespace pymllm::integer
