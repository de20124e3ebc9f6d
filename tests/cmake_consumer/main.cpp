// Uses what ctx offers: the version, a session, an error's type, the operators.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/rand.h>
#include <c10/util/Exception.h>
#include <ctx/ctx.h>

#include <cstdio>

int main() {
  ctx::init();
  std::printf("ctx %s (headers %d.%d.%d), torch %s, %s\n",
              ctx::version().c_str(),
              CTX_VERSION_MAJOR,
              CTX_VERSION_MINOR,
              CTX_VERSION_PATCH,
              ctx::torch_version().c_str(),
              ctx::cpu_capability().c_str());

  ctx::MemoryOptions layer;
  layer.attention.schedule = {8, 4, 2, 2, 1};
  layer.head_dim = 16;
  ctx::Session session({layer, layer}, 10);
  const int64_t one = session.join(), two = session.join();
  for (int t = 0; t < 100; ++t) {
    const at::Tensor x = at::rand({2, 1, 1, 16});
    for (int64_t i = 0; i < session.layers(); ++i) session.step({one, two}, i, x, x, x);
  }
  const int64_t seen = session.seen(session.restore(session.snapshot(two)));

  bool caught = false;
  try {
    session.leave(99);
  } catch (const c10::IndexError&) {
    caught = true;  // thrown in the library, caught by its type here
  }
  const auto step = c10::Dispatcher::singleton().findSchema({"ctx::step_", ""});
  std::printf("%lld tokens seen, %lld bytes\n", (long long)seen, (long long)session.bytes());
  return seen == 100 && caught && step.has_value() ? 0 : 1;
}
