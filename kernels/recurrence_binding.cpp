// The Python face of recurrence.h. Tensors come checked by pymllm/kernels/native/recurrence.py; what they hold is checked
// here.
#include "recurrence.h"

#include <nanobind/nanobind.h>

#include <cstdint>

#include "checks.h"
#include "isa.h"
#include "released.h"
#include "tape.h"

namespace nb = nanobind;

namespace pymllm {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

template <class T> T *at(Address address) { return reinterpret_cast<T *>(address); }

TokenRows rows_at(Address data, int type, Size stride) {
  check_number("the dtype", type, 0, static_cast<int>(FloatType::f16));
  check_side("the stride of tokens", stride);
  return {at<const void>(data), static_cast<FloatType>(type), stride};
}

// Of a step of `tokens` new tokens. slot_count: what the state has; 0: there is none.
Requests requests_at(Address starts, Address lengths, Size count, Address slots, Size slot_count, Size tokens) {
  const Requests requests{at<const std::int32_t>(starts), at<const std::int32_t>(lengths),
                          at<const std::int64_t>(slots), count};
  check_requests(requests.starts, requests.lengths, count, tokens);
  if (requests.slots != nullptr) check_states(requests.slots, count, slot_count);
  return requests;
}

void check_heads(Size many, Size few, Size size, Size other) {
  check_side("the number of heads", many, 1);
  check_side("the number of shared heads or groups", few, 1);
  check_number("heads that are left over, shared among groups", many % few, 0, 0);
  check_side("the size of a head", size, 1);
  check_side("the size of a state", other, 1);
}

void gated_delta_(Address q, Size q_stride, Address k, Size k_stride, Address v, Size v_stride, int type, Address g,
                  int g_type, Size g_stride, Address beta, int beta_type, Size beta_stride, Address y, Address state,
                  Address starts, Address lengths, Size requests, Address slots, Size slot_count, Size tokens,
                  Size key_heads, Size value_heads, Size key_dim, Size value_dim, float normalise_eps, bool channel_decay, int isa, int threads) {
  check_heads(value_heads, key_heads, key_dim, value_dim);
  GatedDelta problem;
  problem.q = rows_at(q, type, q_stride);
  problem.k = rows_at(k, type, k_stride);
  problem.v = rows_at(v, type, v_stride);
  problem.g = rows_at(g, g_type, g_stride);
  problem.beta = rows_at(beta, beta_type, beta_stride);
  problem.y = at<void>(y);
  problem.state = at<float>(state);
  problem.requests = requests_at(starts, lengths, requests, slots, slot_count, tokens);
  problem.key_heads = key_heads;
  problem.value_heads = value_heads;
  problem.key_dim = key_dim;
  problem.value_dim = value_dim;
  problem.normalise_eps = normalise_eps;
  problem.channel_decay = channel_decay;
  check_address("q, k, v, g and beta", q != 0 && k != 0 && v != 0 && g != 0 && beta != 0 ? problem.y : nullptr, tokens > 0);
  gated_delta(problem, static_cast<Isa>(isa), threads);
}

void mamba2_scan_(Address x, Size x_stride, Address b, Size b_stride, Address c, Size c_stride, int type, Address dt,
                  int dt_type, Size dt_stride, Address a, int a_type, Address d, int d_type, Address dt_bias,
                  int dt_bias_type, Address y, Address state, Address starts, Address lengths, Size requests,
                  Address slots, Size slot_count, Size tokens, Size heads, Size groups, Size head_dim, Size state_size, double least_dt,
                  double most_dt, int isa, int threads) {
  check_heads(heads, groups, head_dim, state_size);
  Mamba2Scan problem;
  problem.x = rows_at(x, type, x_stride);
  problem.b = rows_at(b, type, b_stride);
  problem.c = rows_at(c, type, c_stride);
  problem.dt = rows_at(dt, dt_type, dt_stride);
  problem.a = rows_at(a, a_type, 0);
  problem.d = rows_at(d, d_type, 0);
  problem.dt_bias = rows_at(dt_bias, dt_bias_type, 0);
  problem.y = at<void>(y);
  problem.state = at<float>(state);
  problem.requests = requests_at(starts, lengths, requests, slots, slot_count, tokens);
  problem.heads = heads;
  problem.groups = groups;
  problem.head_dim = head_dim;
  problem.state_size = state_size;
  problem.least_dt = least_dt;
  problem.most_dt = most_dt;
  check_address("x, B, C, dt, A, D and dt_bias",
                x != 0 && b != 0 && c != 0 && dt != 0 && a != 0 && d != 0 && dt_bias != 0 ? problem.y : nullptr, tokens > 0);
  mamba2_scan(problem, static_cast<Isa>(isa), threads);
}

void causal_conv_(Address x, Size x_stride, int type, Address weight, int weight_type, Address bias, int bias_type,
                  Address y, Address state, Address starts, Address lengths, Size requests, Address slots,
                  Size slot_count, Size tokens, Size channels, Size kernel, bool silu, int isa, int threads) {
  check_side("the number of channels", channels, 1);
  check_side("the size of the kernel", kernel, 1);
  CausalConv problem;
  problem.x = rows_at(x, type, x_stride);
  problem.weight = rows_at(weight, weight_type, 0);
  problem.bias = rows_at(bias, bias_type, 0);
  problem.y = at<void>(y);
  problem.state = at<float>(state);
  problem.requests = requests_at(starts, lengths, requests, slots, slot_count, tokens);
  problem.channels = channels;
  problem.kernel = kernel;
  problem.silu = silu;
  check_address("x and the weight", x != 0 && weight != 0 ? problem.y : nullptr, tokens > 0);
  causal_conv(problem, static_cast<Isa>(isa), threads);
}

} // namespace

void register_recurrence(nb::module_ &m) {
  const auto released = nb::call_guard<Released>();
  m.def("gated_delta", &Recorded<&gated_delta_>::call, released, "See kernels/recurrence.h.");
  m.def("mamba2_scan", &Recorded<&mamba2_scan_>::call, released, "See kernels/recurrence.h.");
  m.def("causal_conv", &Recorded<&causal_conv_>::call, released, "See kernels/recurrence.h.");
}

} // namespace pymllm
