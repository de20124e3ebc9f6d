// Trains a language model in C++ to copy what only its compressive memory still holds, then streams
// through it token by token. From the repository's folder, with ctx installed:
//
//   cmake -S examples/cpp/train -B build/train -DCMAKE_PREFIX_PATH="$(python -m ctx --cmake-prefix-path)" && cmake --build build/train && build/train/train
//
// A text is a random word of 12 letters and then the word again. Behind the window of 4 tokens there
// are slots of 2 tokens each: a letter that is due is 12 tokens back, in a slot. Letters of the second
// half can be known, those of the first cannot.
//
//   train [--steps N] [--save FILE]     FILE: a state dict, which Python's torch.load reads
#include <ATen/ATen.h>
#include <ctx/modules.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

namespace {

constexpr int64_t kLetters = 16, kWord = 12, kRows = 32;

at::Tensor texts(int64_t rows) {
  const at::Tensor word = at::randint(kLetters, {rows, kWord}, at::kLong);
  return at::cat({word, word}, 1);
}

// Share of the second half that is right, streamed: every token alone, into one memory of constant size.
double copied(ctx::CompressiveTransformer& model, const at::Tensor& text) {
  const at::NoGradGuard no_grad;
  model->eval();
  ctx::ModelMemory memory = model->init_memory(text.size(0));
  int64_t right = 0;
  for (int64_t t = 0; t + 1 < text.size(1); ++t) {
    const auto [logits, after] = model->forward(text.narrow(1, t, 1), memory, {}, true);
    if (t + 1 < kWord) continue;  // nobody can know
    right += logits.argmax(-1).eq(text.select(1, t + 1)).sum().item<int64_t>();
  }
  return static_cast<double>(right) / static_cast<double>(text.size(0) * kWord);
}

}  // namespace

int main(int argc, char** argv) {
  int64_t steps = 600;
  std::string path;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--steps") == 0) steps = std::stoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--save") == 0) path = argv[i + 1];
  }
  torch::manual_seed(0);

  ctx::CompressiveTransformerConfig config;
  config.vocab_size = kLetters, config.embed_dim = 64, config.num_layers = 2, config.num_heads = 4;
  config.window = 4, config.compressed = 8, config.ratio = 2;
  config.compressor = "conv";
  ctx::CompressiveTransformer model(config);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(3e-3));

  for (int64_t step = 1; step <= steps; ++step) {
    const at::Tensor text = texts(kRows);
    const at::Tensor logits = model->forward(text.narrow(1, 0, 2 * kWord - 1)).output;
    const at::Tensor due = text.narrow(1, kWord, kWord);
    const at::Tensor loss = torch::nn::functional::cross_entropy(
        logits.narrow(1, kWord - 1, kWord).flatten(0, 1), due.flatten());
    optimizer.zero_grad();
    loss.backward();
    torch::nn::utils::clip_grad_norm_(model->parameters(), 1.0);
    optimizer.step();
    if (step % std::max<int64_t>(steps / 6, 1) == 0)
      std::printf("step %4lld  loss %.3f\n", static_cast<long long>(step), loss.item<double>());
  }
  const double share = copied(model, texts(64));
  std::printf(
      "streamed: %.1f %% of the second halves copied (chance: %.1f %%), %lld bytes a stream\n",
      100 * share,
      100.0 / kLetters,
      static_cast<long long>(model->init_memory(1).nbytes()));
  if (!path.empty()) ctx::save_state_dict(*model, path);
  return share > 0.9 ? 0 : 1;
}
