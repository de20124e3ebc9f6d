// Weights to files and back, and what is refused. tests/test_cpp_modules.py reads and writes them in
// Python.
#include <ATen/ATen.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <vector>

#include "check.h"
#include "ctx/modules.h"
#include "ctx/weights.h"
#include "streams.h"

namespace {

using at::Tensor;
using ctx::CompressiveAttention;
using ctx::StateDict;
using ctx::test::same;

const std::string kPath = (std::filesystem::temp_directory_path() / "ctx_test_weights.pt").string();

CompressiveAttention layer(const char* compressor = "gated") {
  ctx::CompressiveAttentionOptions options;
  options.embed_dim = 8, options.num_heads = 2, options.window = 4, options.ratio = 2;
  options.compressor = compressor;
  return CompressiveAttention(options);
}

StateDict copied(const CompressiveAttention& module) {
  StateDict made = ctx::state_dict(*module);
  for (auto& [name, tensor] : made) tensor = tensor.detach().clone();
  return made;
}

bool same(const StateDict& one, const StateDict& other) {
  for (const auto& [name, tensor] : one)
    if (!other.contains(name) || !same(tensor.detach(), other.at(name).detach())) return false;
  return one.size() == other.size();
}

void test_there_and_back() {
  CompressiveAttention one = layer(), other = layer();
  EXPECT(!same(copied(one), copied(other)));
  ctx::save_state_dict(*one, kPath);
  EXPECT(same(ctx::read_state_dict(kPath), copied(one)));
  ctx::load_state_dict(*other, kPath);
  EXPECT(same(copied(one), copied(other)));
  for (const Tensor& parameter : other->parameters())
    EXPECT(parameter.requires_grad() && parameter.is_leaf());
  // In another dtype: what is exact stays so.
  one->to(at::kDouble);
  ctx::load_state_dict(*one, kPath);
  EXPECT(one->q_proj->weight.scalar_type() == at::kDouble);
  EXPECT(same(one->q_proj->weight.to(at::kFloat).detach(), other->q_proj->weight.detach()));
  EXPECT(ctx::state_dict(*layer("mean")).size() == 5);
}

void test_refused() {
  CompressiveAttention module = layer();
  const StateDict before = copied(module);
  const auto refuse = [&](const StateDict& state, const std::string& said) {
    EXPECT_THROWS(
        c10::ValueError, "ctx.load_state_dict: " + said, ctx::load_state_dict(*module, state));
    EXPECT(same(copied(module), before));
  };
  StateDict state = copied(layer());
  state.erase("out_proj.weight");
  refuse(state,
         "state must have the names of the module, got missing: out_proj.weight; unknown: none");
  state["out_proj.weights"] = at::ones({8, 8});
  refuse(state,
         "state must have the names of the module, got missing: out_proj.weight; unknown: "
         "out_proj.weights");
  refuse({},
         "state must have the names of the module, got missing: compressed_bias, "
         "compressor.key_gate, compressor.key_position, compressor.value_gate, "
         "compressor.value_position and 4 more; unknown: none");
  state = copied(layer());
  state["q_proj.weight"] = at::ones({8, 4});
  refuse(state, "q_proj.weight must be [8, 8], got [8, 4]");
  state["q_proj.weight"] = Tensor();
  refuse(state, "q_proj.weight must be [8, 8], got []");
  state["q_proj.weight"] = at::ones({8, 8}, at::kLong);
  EXPECT_THROWS(c10::TypeError,
                "ctx.load_state_dict: q_proj.weight must be Float or alike, got Long",
                ctx::load_state_dict(*module, state));
  EXPECT(same(copied(module), before));
}

std::vector<char> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void test_files() {
  CompressiveAttention module = layer();
  ctx::save_state_dict(*module, kPath);
  const std::vector<char> whole = bytes_of(kPath);
  const StateDict before = copied(module);
  const auto refuse = [&](const std::vector<char>& bytes) {
    std::ofstream(kPath, std::ios::binary).write(bytes.data(), static_cast<int64_t>(bytes.size()));
    EXPECT_THROWS(c10::ValueError,
                  "ctx.load_state_dict: path must be a state dict, got a damaged or foreign file",
                  ctx::load_state_dict(*module, kPath));
    EXPECT(same(copied(module), before));
  };
  refuse({});
  refuse({'n', 'o', 't', ' ', 'i', 't'});
  for (size_t size = 1; size < whole.size(); size += whole.size() / 40)
    refuse({whole.begin(), whole.begin() + static_cast<int64_t>(size)});
  for (size_t at = 64; at < whole.size() / 2; at += whole.size() / 40) {
    std::vector<char> damaged = whole;
    damaged[at] = static_cast<char>(~damaged[at]);
    std::ofstream(kPath, std::ios::binary)
        .write(damaged.data(), static_cast<int64_t>(damaged.size()));
    try {
      ctx::load_state_dict(*module, kPath);  // a byte of padding, which holds nothing
    } catch (const c10::ValueError&) {
    }
    EXPECT(same(copied(module), before));
  }
  EXPECT_THROWS(c10::ValueError,
                "ctx.write_state_dict: a must be a tensor, got none",
                ctx::write_state_dict({{"a", Tensor()}}, kPath));
  EXPECT(bytes_of(kPath) != whole);  // the old file is as it was
  bool thrown = false;
  try {
    ctx::load_state_dict(*module, kPath + ".none");
  } catch (const std::system_error& error) {
    thrown = error.code() == std::errc::no_such_file_or_directory;
  }
  EXPECT(thrown);
  std::filesystem::remove(kPath);
}

}  // namespace

int main() {
  test_there_and_back();
  test_refused();
  test_files();
  return ctx::test::status();
}
