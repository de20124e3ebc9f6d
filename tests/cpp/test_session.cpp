// ctx::Session: streams that come and go, against memories of one row each.
#include <ATen/ATen.h>

#include <thread>

#include "check.h"
#include "ctx/session.h"
#include "streams.h"

namespace ctx::test {
namespace {

Session session(int64_t rows, int64_t layers = 2) {
  return {std::vector<MemoryOptions>(layers, options()), rows};
}

KVMemory alone() {
  MemoryOptions one = options();
  one.batch_size = 1;
  return KVMemory(one);
}

at::Tensor whole_tick(Session& session, const std::vector<int64_t>& ids, const Tokens& x) {
  at::Tensor out;
  for (int64_t layer = 0; layer < session.layers(); ++layer)
    out = session.step(ids, layer, x.q, x.k, x.v);
  return out;
}

void test_streams_are_as_alone() {
  Session here = session(3, 1);
  const int64_t one = here.join(), two = here.join();
  std::vector<KVMemory> memories;
  memories.push_back(alone()), memories.push_back(alone());
  for (int64_t first = 0; first < 90; first += 9) {
    const Tokens x(first, 9, at::kFloat, 2);
    const std::vector<int64_t> lengths = {first % 4, 9 - first % 3};
    const at::Tensor out = here.step({two, one}, 0, x.q, x.k, x.v, lengths);
    for (int64_t row = 0; row < 2; ++row) {
      const auto mine = [&](const at::Tensor& t) {
        return t.narrow(0, row, 1).narrow(2, 0, lengths[row]);
      };
      const at::Tensor want = memories[1 - row].step(mine(x.q), mine(x.k), mine(x.v));
      EXPECT(at::allclose(mine(out), want, 1e-6, 1e-6));
    }
    EXPECT(here.seen(one) == memories[0].seen()[0].item<int64_t>());
    EXPECT(here.rewindable(two) == memories[1].rewindable()[0].item<int64_t>());
  }
}

void test_ids_are_never_used_again() {
  Session here = session(2);
  const int64_t one = here.join(), two = here.join();
  EXPECT_THROWS(c10::ValueError, "ctx.Session.join: streams must be at most rows = 2", here.join());
  here.leave(one);
  EXPECT_THROWS(c10::IndexError, "ctx.Session.leave: id must be", here.leave(one));
  const int64_t three = here.fork(two);
  EXPECT(three != one && three != two);
  EXPECT((here.ids() == std::vector<int64_t>{two, three}));
}

void test_a_snapshot_goes_on() {
  Session here = session(2), there = session(1);
  const int64_t id = here.join();
  whole_tick(here, {id}, Tokens(0, 37, at::kFloat, 1));
  const int64_t moved = there.restore(here.snapshot(id));
  const Tokens more(37, 23, at::kFloat, 1);
  EXPECT(same(whole_tick(here, {id}, more), whole_tick(there, {moved}, more)));
  here.rewind(id, 5), there.rewind(moved, 5);
  EXPECT(here.snapshot(id) == there.snapshot(moved));
}

void test_sessions_in_threads() {
  std::vector<at::Tensor> out(4);
  std::vector<std::thread> threads;
  for (at::Tensor& mine : out) {
    threads.emplace_back([&mine] {
      Session here = session(4);
      const std::vector<int64_t> ids = {here.join(), here.join(), here.join()};
      for (int64_t first = 0; first < 60; first += 3) {
        mine = whole_tick(here, {ids[first % 2], ids[2]}, Tokens(first, 3, at::kFloat, 2));
        here.leave(here.fork(ids[1]));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const at::Tensor& mine : out) EXPECT(same(mine, out[0]));
}

void test_what_a_tick_leaves_behind() {
  Session here = session(1);
  const int64_t id = here.join();
  whole_tick(here, {id}, Tokens(0, 20, at::kFloat, 1));
  const auto call = [&](int64_t layer, int64_t tokens) {
    const Tokens x(20, tokens, at::kFloat, 1);
    here.step({id}, layer, x.q, x.k, x.v);
  };
  call(0, 2);
  EXPECT_THROWS(c10::ValueError, "ctx.Session.step: ids, T and lengths must be those", call(1, 3));
  here.rewind(id, 0);  // gives up the tick
  EXPECT(here.seen(id) == 20 && here.rewindable(id) == 5);
  call(0, 8);
  EXPECT_THROWS(c10::ValueError, "ctx.Session.snapshot: id must be", here.snapshot(id));
}

}  // namespace
}  // namespace ctx::test

int main() {
  ctx::test::test_streams_are_as_alone();
  ctx::test::test_ids_are_never_used_again();
  ctx::test::test_a_snapshot_goes_on();
  ctx::test::test_sessions_in_threads();
  ctx::test::test_what_a_tick_leaves_behind();
  return ctx::test::status();
}
