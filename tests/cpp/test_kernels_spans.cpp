// The kernels of the differentiable path, compiled into this program, against double loops and their
// finite differences: mass, capped logits, relative positions, keys of a past.
#define CTX_CPU_CAPABILITY DEFAULT
#include "check.h"
#include "kernel_reference.h"
#include "kernels/cpu/spans_backward.cpp"
#include "kernels/cpu/spans_forward.cpp"

namespace ctx::test {
namespace {

constexpr int64_t kBatch = 2;
using Numbers = std::vector<double>;

// Tokens begin ... begin + tokens - 1 of a stream in two rows, the second of which is padded at the
// left: its first three tokens are before the stream. Slots and window have a past in rings.
struct Call {
  Law law;
  int64_t begin = 0, tokens = 40;
  int64_t slots = 0;                // of the call
  int64_t slot_past = 0, past = 0;  // keys of the past
  Numbers q, relative, compressed_relative, keys[3], values[3], mass;
  Numbers past_keys[3], past_values[3];
  Numbers past_mass;
  std::vector<int64_t> position, first[3], past_first[3];
  Numbers grad_out, grad_logsumexp;

  Call(Law l, int64_t first_token, int64_t count) : law(std::move(l)), begin(first_token) {
    tokens = count;
    const Schedule& s = law.clock.schedule;
    const int64_t last = s.groups(begin + tokens - 1);
    slot_past = begin == 0 ? 0 : s.compressed, past = begin == 0 ? 0 : s.max_window();
    const int64_t before = s.groups(begin - 1);
    slots = last - before;
    const int64_t c = kBatch * law.kv_heads;
    q = numbers(kBatch * law.heads * tokens * law.head_dim, 1);
    relative = numbers(kBatch * law.heads * tokens * law.relative_dim, 2);
    compressed_relative = numbers(kBatch * law.heads * tokens * law.relative_dim, 3);
    const int64_t own[3] = {s.sinks, slots, tokens}, old[3] = {0, slot_past, past};
    for (int i = 0; i < 3; ++i) {
      keys[i] = numbers(c * own[i] * law.head_dim, 4 + i);
      values[i] = numbers(c * own[i] * law.value_dim, 7 + i);
      past_keys[i] = numbers(c * old[i] * law.head_dim, 10 + i);
      past_values[i] = numbers(c * old[i] * law.value_dim, 13 + i);
    }
    mass = numbers(c * slots, 16);
    past_mass = numbers(c * slot_past, 17);
    grad_out = numbers(kBatch * law.heads * tokens * law.value_dim, 18);
    grad_logsumexp = numbers(kBatch * law.heads * tokens, 19);
    const int64_t firsts[3] = {0, before - slot_past, begin - past};
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int i = 0; i < 3; ++i) past_first[i].push_back(firsts[i] + shift(b, i));
      for (int64_t t = 0; t < tokens; ++t) {
        position.push_back(begin + t - (b == 1 && begin == 0 ? 3 : 0));
        if (position.back() < 0) position.back() = -1;
        for (int i = 0; i < 3; ++i) first[i].push_back(firsts[i] + shift(b, i));
      }
    }
  }

  // Row 1 of a first call is three tokens late.
  int64_t shift(int64_t b, int region) const {
    return region == kWindow && b == 1 && begin == 0 ? -3 : 0;
  }

  Key key(int64_t b, int64_t h, int region, int64_t number) const {
    const int64_t head = b * law.kv_heads + h / law.q_per_kv();
    const int64_t old[3] = {0, slot_past, past};
    const int64_t place = number - past_first[region][b];
    if (place < old[region]) {
      const int64_t at = head * old[region] + number % old[region];
      return {&past_keys[region][at * law.head_dim],
              &past_values[region][at * law.value_dim],
              region == kCompressed ? past_mass[at] : 0.0};
    }
    const int64_t own[3] = {law.clock.schedule.sinks, slots, tokens};
    const int64_t at = head * own[region] + place - old[region];
    return {&keys[region][at * law.head_dim],
            &values[region][at * law.value_dim],
            region == kCompressed ? mass[at] : 0.0};
  }

  Attended attend(int64_t b, int64_t h, int64_t i) const {
    const int64_t row = (b * law.heads + h) * tokens + i;
    return attend_one(law,
                      position[b * tokens + i],
                      h,
                      &q[row * law.head_dim],
                      relative.data() + row * law.relative_dim,
                      compressed_relative.data() + row * law.relative_dim,
                      [&](int region, int64_t n) { return key(b, h, region, n); });
  }

  // What the gradients are of.
  double loss() const {
    double sum = 0;
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t h = 0; h < law.heads; ++h) {
        for (int64_t i = 0; i < tokens; ++i) {
          if (position[b * tokens + i] < 0) continue;
          const int64_t row = (b * law.heads + h) * tokens + i;
          const Attended a = attend(b, h, i);
          for (int64_t d = 0; d < law.value_dim; ++d)
            sum += a.out[d] * grad_out[row * law.value_dim + d];
          sum += a.logsumexp * grad_logsumexp[row];
        }
      }
    }
    return sum;
  }
};

// The kernels' results.
struct Results {
  Numbers out, logsumexp, q, relative, compressed_relative, keys[3], values[3], mass, bias;
};

Results run(Call& call) {
  const Law& law = call.law;
  const int64_t own[3] = {law.clock.schedule.sinks, call.slots, call.tokens};
  const int64_t old[3] = {0, call.slot_past, call.past};
  const auto strided = [](Numbers& x, int64_t heads, int64_t count, int64_t width) {
    return Strided{x.data(), heads * count * width, count * width, width};
  };
  Results r;
  SpansBackwardArgs back;
  SpansArgs& a = back.forward;
  a.clock = law.clock, a.rotary = law.rotary(), a.storage = Storage::kFloat64;
  a.batch = kBatch, a.heads = law.heads, a.kv_heads = law.kv_heads, a.tokens = call.tokens;
  a.head_dim = law.head_dim, a.value_dim = law.value_dim;
  a.scale = law.scale, a.logit_softcap = law.softcap;
  a.bias = law.bias.empty() ? nullptr : law.bias.data();
  a.slopes = law.slopes.empty() ? nullptr : law.slopes.data();
  a.position = call.position.data();
  a.queries = strided(call.q, law.heads, call.tokens, law.head_dim);
  a.relative.dim = law.relative_dim;
  a.relative.queries = strided(call.relative, law.heads, call.tokens, law.relative_dim);
  a.relative.compressed =
      strided(call.compressed_relative, law.heads, call.tokens, law.relative_dim);
  back.key_width = back.value_width = kSpanWidthStep;
  for (int i = 0; i < 3; ++i) {
    Span& span = a.spans[i];
    span.size = own[i] + old[i];
    span.keys = strided(call.keys[i], law.kv_heads, own[i], law.head_dim);
    span.values = strided(call.values[i], law.kv_heads, own[i], law.value_dim);
    span.first = call.first[i].data();
    if (old[i] > 0) {
      span.past = {old[i],
                   old[i],
                   Storage::kFloat64,
                   call.past_keys[i].data(),
                   call.past_values[i].data(),
                   call.past_first[i].data(),
                   nullptr};
    }
    r.keys[i].assign(kBatch * law.kv_heads * own[i] * kSpanWidthStep, 0.0);
    r.values[i] = r.keys[i];
    back.grad_keys[i] = r.keys[i].data(), back.grad_values[i] = r.values[i].data();
  }
  a.spans[kCompressed].mass = call.mass.data();
  if (call.slot_past > 0) a.spans[kCompressed].past.mass = call.past_mass.data();
  r.out.resize(call.grad_out.size()), r.logsumexp.resize(call.grad_logsumexp.size());
  a.out = strided(r.out, law.heads, call.tokens, law.value_dim);
  a.logsumexp = r.logsumexp.data();
  cpu::DEFAULT::spans_forward(a);
  back.grad_out = strided(call.grad_out, law.heads, call.tokens, law.value_dim);
  back.grad_logsumexp = call.grad_logsumexp.data();
  r.q.resize(call.q.size()), r.relative.resize(call.relative.size());
  r.compressed_relative.resize(call.compressed_relative.size());
  back.grad_queries = strided(r.q, law.heads, call.tokens, law.head_dim);
  back.grad_relative = strided(r.relative, law.heads, call.tokens, law.relative_dim);
  back.grad_compressed_relative =
      strided(r.compressed_relative, law.heads, call.tokens, law.relative_dim);
  r.mass.assign(call.mass.size(), 0.0);
  back.grad_mass[kCompressed] = r.mass.data();
  r.bias.assign(kBatch * law.heads, 0.0);
  back.grad_bias = r.bias.data();
  cpu::DEFAULT::spans_backward(back);
  return r;
}

// Some of the gradients against central differences of the loss.
void check_gradient(Call& call, Numbers& x, const std::function<double(size_t)>& gradient) {
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < x.size(); i += 1 + x.size() / 12) {
    const double before = x[i];
    x[i] = before + kStep;
    const double above = call.loss();
    x[i] = before - kStep;
    const double below = call.loss();
    x[i] = before;
    const double expected = (above - below) / (2 * kStep);
    EXPECT(std::abs(gradient(i) - expected) < 1e-7 * (1 + std::abs(expected)));
  }
}

void check(Call call) {
  const Results r = run(call);
  const Law& law = call.law;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t h = 0; h < law.heads; ++h) {
      for (int64_t i = 0; i < call.tokens; ++i) {
        const int64_t row = (b * law.heads + h) * call.tokens + i;
        const bool absent = call.position[b * call.tokens + i] < 0;
        const Attended expected =
            absent ? Attended{Numbers(law.value_dim, 0.0), 0} : call.attend(b, h, i);
        for (int64_t d = 0; d < law.value_dim; ++d)
          EXPECT(std::abs(r.out[row * law.value_dim + d] - expected.out[d]) < 1e-12);
        if (!absent) EXPECT(std::abs(r.logsumexp[row] - expected.logsumexp) < 1e-12);
      }
    }
  }
  check_gradient(call, call.q, [&](size_t i) { return r.q[i]; });
  check_gradient(call, call.relative, [&](size_t i) { return r.relative[i]; });
  check_gradient(
      call, call.compressed_relative, [&](size_t i) { return r.compressed_relative[i]; });
  check_gradient(call, call.mass, [&](size_t i) { return r.mass[i]; });
  check_gradient(call, call.law.bias, [&](size_t h) { return r.bias[h] + r.bias[law.heads + h]; });
  for (int region = 0; region < 3; ++region) {
    const auto padded = [](const Numbers& x, size_t i, int64_t width) {
      return x[i / width * kSpanWidthStep + i % width];
    };
    check_gradient(
        call, call.keys[region], [&](size_t i) { return padded(r.keys[region], i, law.head_dim); });
    check_gradient(call, call.values[region], [&](size_t i) {
      return padded(r.values[region], i, law.value_dim);
    });
  }
}

Law law(bool token_distance, bool relative, double softcap) {
  Law made;
  made.clock = {{7, 4, 3, 4, 2}, token_distance};
  if (!relative) made.inv_freq = {1.0, 0.3}, made.attention_factor = 1.2;
  if (relative) made.relative_dim = 14;
  made.softcap = softcap;
  made.bias = {0.1, -0.2, 0.3, 0.0};
  made.slopes = {0.01, 0.02, 0.3, 0.04};
  return made;
}

void laws() {
  for (const bool token_distance : {false, true}) {
    for (const bool relative : {false, true}) {
      for (const double softcap : {0.0, 1.5}) {
        const Law one = law(token_distance, relative, softcap);
        check(Call(one, 0, 40));
        check(Call(one, 401, 1));
        check(Call(one, 402, 70));
        Law long_window = one;  // several blocks of keys
        long_window.clock.schedule = {130, 150, 2, 4, 0};
        check(Call(long_window, 1001, 9));
      }
    }
  }
}

// A key that no query sees, and its mass, reach nothing; nor does a query without a gradient.
void not_finite() {
  for (const bool relative : {false, true}) {
    for (const double softcap : {0.0, 1.5}) {
      Call clean(law(false, relative, softcap), 402, 30), call = clean;
      const double nan = std::numeric_limits<double>::quiet_NaN();
      const Law& l = call.law;
      for (int64_t head = 0; head < kBatch * l.kv_heads; ++head) {
        const int64_t last = (head + 1) * call.tokens - 1;  // seen by the last token alone
        call.keys[kWindow][last * l.head_dim] = nan;
        const int64_t slot = (head + 1) * call.slots - 1;
        call.mass[slot] = nan;
        call.values[kCompressed][slot * l.value_dim] = nan;
      }
      // The last slot's first reader; from there on queries have no gradient.
      const Schedule& s = l.clock.schedule;
      int64_t reader = 0;
      while (s.groups(call.begin + reader) < s.groups(call.begin + call.tokens - 1)) ++reader;
      for (Call* one : {&clean, &call}) {
        for (int64_t row = 0; row < kBatch * l.heads; ++row) {
          for (int64_t i = reader; i < call.tokens; ++i) {
            one->grad_logsumexp[row * call.tokens + i] = 0;
            for (int64_t d = 0; d < l.value_dim; ++d)
              one->grad_out[(row * call.tokens + i) * l.value_dim + d] = 0;
            if (one == &call && relative) {
              call.relative[(row * call.tokens + i) * l.relative_dim] = nan;
              call.compressed_relative[(row * call.tokens + i) * l.relative_dim] = nan;
            }
          }
        }
      }
      const Results expected = run(clean), got = run(call);
      for (int64_t row = 0; row < kBatch * l.heads; ++row) {
        for (int64_t i = 0; i < reader * l.value_dim; ++i) {
          const int64_t at = row * call.tokens * l.value_dim + i;
          EXPECT(got.out[at] == expected.out[at]);
        }
      }
      EXPECT(got.q == expected.q && got.mass == expected.mass && got.bias == expected.bias);
      EXPECT(got.relative == expected.relative);
      EXPECT(got.compressed_relative == expected.compressed_relative);
      for (int i = 0; i < 3; ++i)
        EXPECT(got.keys[i] == expected.keys[i] && got.values[i] == expected.values[i]);
    }
  }
}

// The number of threads changes no bit.
void threads() {
  for (const bool relative : {false, true}) {
    Call call(law(false, relative, 1.5), 402, 600);
    at::set_num_threads(1);
    const Results one = run(call);
    at::set_num_threads(7);
    const Results seven = run(call);
    EXPECT(one.out == seven.out && one.q == seven.q && one.mass == seven.mass);
    EXPECT(one.relative == seven.relative && one.compressed_relative == seven.compressed_relative);
    for (int i = 0; i < 3; ++i) EXPECT(one.keys[i] == seven.keys[i]);
  }
}

}  // namespace
}  // namespace ctx::test

int main() {
  ctx::test::laws();
  ctx::test::not_finite();
  ctx::test::threads();
  return ctx::test::status();
}
