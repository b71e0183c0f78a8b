// All blocks of a model for few rows of x, as one operation with one parallel region: a decoding
// step without a dispatch, a fork and a join for each of its small parts. Compiled and loaded by
// __init__.py; the stages are in step.cpp.
//
// Letters: B rows, T positions a row, S positions of the cache, H / K query / key-value heads, D
// numbers a head.

#include "step.h"

#include "weights.h"

#include <ATen/Parallel.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <mutex>
#include <string>

namespace {
using namespace llama3;

constexpr int64_t MAX_ROWS = 16;  // B x T
constexpr int LINEARS = 7;        // wq, wk, wv, wo, w1, w2, w3

// The weights of a linear from its tensors, as a module of this kind stores them.
Weights weights_of(const std::string& kind, at::ArrayRef<Tensor> tensors, int64_t outputs) {
  if (kind == "plain" && tensors.size() == 1) return plain_weights(tensors[0]);
  if (kind == "int8" && tensors.size() == 2) return int8_weights(tensors[0], tensors[1]);
  if (kind == "int4" && tensors.size() == 3)
    return int4_weights(tensors[0], tensors[1], tensors[2], outputs);
  if (kind == "blocks" && tensors.size() == 1) return block_weights(tensors[0], outputs);
  TORCH_CHECK(false, "no linear of kind ", kind, " has ", tensors.size(), " tensors");
}

// The blocks' weights. Holds their tensors and reads addresses anew where these have changed.
struct Layers : torch::CustomClassHolder {
  // tensors: for each block the weights of attention_norm and ffn_norm, and the tensors of each
  // linear. kinds, counts, outputs: for each linear, see weights_of.
  Layers(std::vector<Tensor> tensors, std::vector<std::string> kinds, std::vector<int64_t> counts,
         std::vector<int64_t> outputs, std::vector<int64_t> heads, double eps)
      : tensors_(std::move(tensors)), kinds_(std::move(kinds)), counts_(std::move(counts)),
        outputs_(std::move(outputs)), heads_(std::move(heads)), eps_(eps) {
    TORCH_CHECK(!kinds_.empty() && kinds_.size() % LINEARS == 0 &&
                    counts_.size() == kinds_.size() && outputs_.size() == kinds_.size(),
                "give the kind, tensors and outputs of ", LINEARS, " linears for each block");
    size_t count = kinds_.size() / LINEARS * 2;
    for (const int64_t n : counts_) count += n;
    TORCH_CHECK(count == tensors_.size(), "expected ", count, " tensors, got ", tensors_.size());
    TORCH_CHECK(heads_.size() == 3 && heads_[0] > 0 && heads_[1] > 0 && heads_[2] > 0 &&
                    heads_[0] % heads_[1] == 0 && heads_[2] % 2 == 0,
                "heads must be query heads, key-value heads and an even width of a head");
    view();
  }

  // x (B, T, dim); keys and values of each block (rows, S, K, D), of which the rows from first_row
  // on are used; positions (B or 1, T); turns (T, D / 2) or (B, T, D / 2) -> (B, T, dim).
  Tensor forward(const Tensor& x, const std::vector<Tensor>& keys,
                 const std::vector<Tensor>& values, const Tensor& positions, const Tensor& turns,
                 int64_t first_row) {
    std::vector<Block> blocks = current_blocks();
    Sizes sizes = sizes_of(x);
    check_places(sizes, positions, turns);
    TORCH_CHECK(keys.size() == blocks.size() && values.size() == blocks.size(), "give keys and ",
                "values for each of ", blocks.size(), " blocks");
    for (size_t i = 0; i < blocks.size(); i++) {
      blocks[i].keys = rows_of_cache(keys[i], keys[0], sizes, first_row);
      blocks[i].values = rows_of_cache(values[i], values[0], sizes, first_row);
      for (Linear* l : linears(blocks[i]))
        l->method = method_for(l->w, sizes.M, dtype_ == at::kBFloat16);
    }
    TORCH_CHECK(keys[0].sizes() == values[0].sizes(), "keys and values must have the same shape");
    const Tensor at = positions.contiguous(), by = turns.contiguous();
    attention::Job cache = job_of(sizes, keys[0], values[0], at);
    Tensor y = x.clone(at::MemoryFormat::Contiguous);
    const auto* angles = static_cast<const float*>(by.const_data_ptr());
    const int64_t turn_rows = by.numel() / by.size(-1);
    run_step(sizes, blocks, cache, y.mutable_data_ptr(), dtype_ == at::kBFloat16, angles,
             turn_rows);
    return y;
  }

 private:
  // Any thread may be the first to find that weights have moved.
  std::vector<Block> current_blocks() {
    const std::lock_guard lock(mutex_);
    if (moved()) view();
    return blocks_;
  }

  static std::array<Linear*, LINEARS> linears(Block& b) {
    return {&b.wq, &b.wk, &b.wv, &b.wo, &b.w1, &b.w2, &b.w3};
  }

  bool moved() const {
    for (size_t i = 0; i < tensors_.size(); i++)
      if (tensors_[i].const_data_ptr() != addresses_[i]) return true;
    return false;
  }

  // Reads the tensors' addresses and checks their types and shapes.
  void view() {
    std::vector<Block> blocks(kinds_.size() / LINEARS);
    dtype_ = tensors_[0].scalar_type(), dim_ = tensors_[0].numel();
    TORCH_CHECK(dtype_ == at::kFloat || dtype_ == at::kBFloat16, "norms must be fp32 or bf16");
    const auto* tensor = tensors_.data();
    for (size_t i = 0; i < blocks.size(); i++) {
      blocks[i].attention_norm = norm(*tensor++), blocks[i].ffn_norm = norm(*tensor++);
      size_t which = i * LINEARS;
      for (Linear* l : linears(blocks[i])) {
        l->w = weights_of(kinds_[which], {tensor, size_t(counts_[which])}, outputs_[which]);
        tensor += counts_[which++];
      }
      if (i == 0) hidden_ = blocks[0].w1.w.N;
      check_shapes(blocks[i]);
    }
    addresses_.clear();
    for (const Tensor& t : tensors_) addresses_.push_back(t.const_data_ptr());
    blocks_ = std::move(blocks);
  }

  const void* norm(const Tensor& w) const {
    check_cpu("a norm's weight", w);
    TORCH_CHECK(w.scalar_type() == dtype_ && w.dim() == 1 && w.numel() == dim_,
                "all norms must be ", dtype_, " (", dim_, ",); got ", w.sizes());
    return w.const_data_ptr();
  }

  void check_shapes(Block& b) const {
    const int64_t q = heads_[0] * heads_[2], k = heads_[1] * heads_[2];
    const int64_t outputs[] = {q, k, k, dim_, hidden_, dim_, hidden_};
    const int64_t inputs[] = {dim_, dim_, dim_, q, dim_, hidden_, dim_};
    int i = 0;
    for (const Linear* l : linears(b)) {
      TORCH_CHECK(l->w.N == outputs[i] && l->w.K == inputs[i], "linear ", i,
                  " of a block must be (", outputs[i], ", ", inputs[i], "), not (", l->w.N, ", ",
                  l->w.K, ")");
      i++;
    }
  }

  Sizes sizes_of(const Tensor& x) const {
    TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == dtype_, "x must be ", dtype_,
                " on the CPU");
    TORCH_CHECK(x.dim() == 3 && x.size(2) == dim_, "x must be (B, T, ", dim_, "); got ", x.sizes());
    const int64_t M = x.size(0) * x.size(1);
    TORCH_CHECK(M >= 1 && M <= MAX_ROWS, "x must have 1 to ", MAX_ROWS, " rows, not ", M);
    return {x.size(0), x.size(1), M, dim_, hidden_, heads_[0], heads_[1], heads_[2],
            static_cast<float>(eps_), std::max(1, at::get_num_threads())};
  }

  void check_places(const Sizes& s, const Tensor& positions, const Tensor& turns) const {
    TORCH_CHECK(positions.device().is_cpu() && positions.scalar_type() == at::kLong &&
                    positions.dim() == 2 &&
                    (positions.size(0) == 1 || positions.size(0) == s.B) &&
                    positions.size(1) == s.T,
                "positions must be int64 (B or 1, T); got ", positions.sizes());
    TORCH_CHECK(turns.device().is_cpu() && turns.scalar_type() == at::kComplexFloat &&
                    (turns.dim() == 2 || (turns.dim() == 3 && turns.size(0) == s.B)) &&
                    turns.size(-2) == s.T && turns.size(-1) * 2 == s.D,
                "turns must be complex64 (T, D / 2) or (B, T, D / 2); got ", turns.sizes());
  }

  // The address of row first_row of a cache, which must be like that of the first block.
  char* rows_of_cache(const Tensor& cache, const Tensor& like, const Sizes& s,
                      int64_t first_row) const {
    TORCH_CHECK(cache.device().is_cpu() && cache.scalar_type() == dtype_ && cache.dim() == 4 &&
                    cache.size(2) == s.K && cache.size(3) == s.D && cache.stride(3) == 1,
                "a cache must be ", dtype_, " (rows, S, ", s.K, ", ", s.D, ") on the CPU; got ",
                cache.sizes());
    TORCH_CHECK(cache.sizes() == like.sizes() && cache.strides() == like.strides(),
                "the caches of all blocks must have the same shape and strides");
    TORCH_CHECK(first_row >= 0 && first_row + s.B <= cache.size(0), "rows ", first_row, " to ",
                first_row + s.B - 1, " are outside a cache of ", cache.size(0));
    return static_cast<char*>(cache.mutable_data_ptr()) +
           first_row * cache.stride(0) * cache.element_size();
  }

  static attention::Job job_of(const Sizes& s, const Tensor& keys, const Tensor& values,
                               const Tensor& positions) {
    attention::Job job{s.B, s.T, s.H, s.K, s.D, keys.size(1)};
    job.width = (s.D + 63) / 64 * 64;
    std::copy_n(keys.strides().data(), 3, job.key_strides);
    std::copy_n(values.strides().data(), 3, job.value_strides);
    job.positions = positions.const_data_ptr<int64_t>();
    job.position_stride = positions.size(0) == 1 ? 0 : s.T;
    job.scale = 1 / std::sqrt(static_cast<float>(s.D));
    for (int64_t i = 0; i < positions.numel(); i++)
      TORCH_CHECK(job.positions[i] >= 0 && job.positions[i] < job.S, "position ", job.positions[i],
                  " is outside the ", job.S, " of the cache");
    return job;
  }

  const std::vector<Tensor> tensors_;
  const std::vector<std::string> kinds_;
  const std::vector<int64_t> counts_, outputs_, heads_;
  const double eps_;
  std::mutex mutex_;  // of what follows
  at::ScalarType dtype_;
  int64_t dim_, hidden_;
  std::vector<const void*> addresses_;
  std::vector<Block> blocks_;
};
}  // namespace

TORCH_LIBRARY_FRAGMENT(llama3, m) {
  using torch::arg;
  m.class_<Layers>("Layers")
      .def(torch::init<std::vector<Tensor>, std::vector<std::string>, std::vector<int64_t>,
                       std::vector<int64_t>, std::vector<int64_t>, double>(),
           "",
           {arg("tensors"), arg("kinds"), arg("counts"), arg("outputs"), arg("heads"), arg("eps")})
      .def("forward", &Layers::forward, "",
           {arg("x"), arg("keys"), arg("values"), arg("positions"), arg("turns"),
            arg("first_row")});
}
