// See step.h: the stages of a step, in the order of TransformerBlock in llama/model.py. Results are
// rounded to T where the modules round theirs.

#include "step.h"

#include "pointwise_job.h"
#include "team.h"

#include <array>
#include <memory>
#include <numeric>
#include <type_traits>

namespace {
using namespace llama3;

template <class T>
class Step {
 public:
  // x (M, dim) is replaced by the result. `cache` has the strides and positions of keys and values;
  // turns has D / 2 complex numbers for each of M rows, or for each of T positions.
  Step(const Sizes& sizes, const std::vector<Block>& blocks, const attention::Job& cache, T* x,
       const float* turns, int64_t turn_rows)
      : sizes_(sizes), blocks_(blocks), job_(cache), shape_(cache), x_(x), turns_(turns),
        turn_rows_(turn_rows), team_(sizes.threads, STAGES * blocks.size()) {
    const auto& [B, positions, M, dim, hidden, H, K, D, eps, threads] = sizes;
    q_ = take<T>(M * H * D), k_ = take<T>(M * K * D), v_ = take<T>(M * K * D);
    attended_ = take<T>(M * H * D), y_ = take<T>(M * dim);
    gate_ = take<T>(M * hidden), up_ = take<T>(M * hidden);
    job_.queries = q_, job_.out = attended_;
    int64_t longest = 0;
    for (int64_t i = 0; i < (job_.position_stride ? M : positions); i++)
      longest = std::max(longest, job_.positions[i] + 1);
    tasks_ = attention::tasks_of(job_, shape_, PART, longest);
    parts_ = (longest + PART - 1) / PART;
    sums_ = take<float>(tasks_.size() * shape_.stride);
    left_ = std::vector<std::atomic<int64_t>>(tasks_.size() / parts_);
    for (auto& left : left_) left = parts_;
    int64_t form_bytes = 0;
    for (const Block& b : blocks)
      for (const Linear* l : {&b.wq, &b.wk, &b.wv, &b.wo, &b.w1, &b.w2, &b.w3})
        form_bytes =
            std::max(form_bytes, scratch_bytes(l->method.form, M, l->w.K, l->w.group));
    form_bytes_ = form_bytes;
    for (int64_t i = 0; i < threads; i++) {
      normed_.push_back(take<T>(M * dim));
      forms_.push_back(take<char>(3 * form_bytes));
      blocks_of_cache_.push_back(take<float>(2 * attention::BLOCK * job_.width));
    }
  }

  void run() {
    team_.run([&](Team::Member& me) {
      for (const Block& block : blocks_) {
        heads(me, block);
        attend(me, block);
        output(me, block);
        gate(me, block);
        down(me, block);
      }
    });
  }

 private:
  static constexpr int64_t STAGES = 9;    // of a block: attention, and two for each of 4 inputs
  static constexpr int64_t SOLO = 2;     // up to so many rows, each thread prepares x for itself
  static constexpr int64_t PART = 128;   // keys of an attention task: the same for any batch
  static constexpr int64_t LEAST = 8192;  // bytes of weights that a thread takes at least

  // Queries, keys and values of normed x; queries and keys rotated, keys and values in the cache.
  void heads(Team::Member& me, const Block& b) {
    const int64_t q = b.wq.units(), k = b.wk.units(), v = b.wv.units();
    const auto in = prepared<3>(me, x_, b.attention_norm, {&b.wq, &b.wk, &b.wv}, q + k + v);
    me.share(q + k + v, least(b.wq), [&](int64_t begin, int64_t end) {
      if (begin < q) {
        const Range n = multiply(b.wq, in[0], q_, begin, std::min(end, q));
        rotate(q_, sizes_.H, n, [&](int64_t m, int64_t i) { return at(q_, m, b.wq.w.N, i); });
      }
      if (begin < q + k && end > q) {
        const Range n = multiply(b.wk, in[1], k_, std::max(begin, q) - q, std::min(end, q + k) - q);
        rotate(k_, sizes_.K, n, [&](int64_t m, int64_t i) { return key(b, m, i); });
      }
      if (end > q + k) {
        const Range n = multiply(b.wv, in[2], v_, std::max(begin, q + k) - q - k, end - q - k);
        each_part(n, [&](int64_t m, int64_t i, int64_t count) {
          std::copy_n(at(v_, m, b.wv.w.N, i), count, value(b, m, i));
        });
      }
    });
  }

  // Attention over the cache in parts of PART keys. Whoever computes the last part merges them.
  void attend(Team::Member& me, const Block& b) {
    const attention::Kernels& kernels = attention::kernels(IS_BF16);
    attention::Job job = job_;
    job.keys = b.keys, job.values = b.values;
    me.share(tasks_.size(), 1, [&](int64_t begin, int64_t end) {
      attention::Scratch to;
      to.keys = blocks_of_cache_[me.index];
      to.values = to.keys + attention::BLOCK * job.width;
      for (int64_t i = begin; i < end; i++) {
        shape_.place(to, sums_ + i * shape_.stride, job.width);
        kernels.attend(job, tasks_[i], to);
        const int64_t first = i - i % parts_;
        if (left_[i / parts_].fetch_sub(1) > 1) continue;
        left_[i / parts_] = parts_;
        shape_.place(to, sums_ + first * shape_.stride, job.width);
        kernels.finish(job, tasks_[first], to, parts_, shape_.stride);
      }
    });
  }

  void output(Team::Member& me, const Block& b) { add(me, b.wo, attended_); }

  // silu(w1 x) * w3 x of normed x.
  void gate(Team::Member& me, const Block& b) {
    const int64_t unit = std::lcm(b.w1.method.outputs, b.w3.method.outputs), N = b.w1.w.N;
    const int64_t units = (N + unit - 1) / unit;
    const auto in = prepared<2>(me, x_, b.ffn_norm, {&b.w1, &b.w3}, units);
    me.share(units, least(b.w1), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * unit, last = std::min(end * unit, N);
      multiply(b.w1, in[0], gate_, first / b.w1.method.outputs, upper(last, b.w1.method.outputs));
      multiply(b.w3, in[1], up_, first / b.w3.method.outputs, upper(last, b.w3.method.outputs));
      for (int64_t m = 0; m < sizes_.M; m++) {
        T *a = at(gate_, m, N, first), *c = at(up_, m, N, first);
        pointwise::kernels(IS_BF16).gate({0, 0, a, c, a}, 0, last - first);
      }
    });
  }

  void down(Team::Member& me, const Block& b) { add(me, b.w2, gate_); }

  // x += linear(input).
  void add(Team::Member& me, const Linear& linear, const T* input) {
    const auto in = prepared<1>(me, input, nullptr, {&linear}, linear.units());
    me.share(linear.units(), least(linear), [&](int64_t begin, int64_t end) {
      const Range n = multiply(linear, in[0], y_, begin, end);
      for (int64_t m = 0; m < sizes_.M; m++)
        for (int64_t i = m * sizes_.dim + n.begin; i < m * sizes_.dim + n.end; i++) x_[i] += y_[i];
    });
  }

  // The rows of x, normed if there is a weight for that, in the form that each linear reads. For
  // few rows every thread does this for itself, which is faster than waiting for another.
  template <size_t L>
  std::array<Inputs, L> prepared(Team::Member& me, const T* x, const void* norm,
                                 const std::array<const Linear*, L>& linears, int64_t units) {
    const int64_t M = sizes_.M, own = M <= SOLO ? me.index : 0;
    std::array<Inputs, L> in;
    const T* rows = norm ? normed_[own] : x;
    for (size_t i = 0; i < L; i++) {
      const auto& [w, method] = *linears[i];
      if (i && method.form == in[i - 1].form && w.group == in[i - 1].group)
        in[i] = in[i - 1];
      else
        in[i] = inputs_of(method.form, rows, IS_BF16, M, w.K, w.group,
                          forms_[own] + i * form_bytes_);
    }
    const auto fill = [&](int64_t begin, int64_t end) {
      const pointwise::Job job{sizes_.dim, sizes_.eps, x, norm, normed_[own]};
      if (norm) pointwise::kernels(IS_BF16).norm(job, begin, end);
      for (size_t i = 0; i < L; i++)
        if (!i || in[i].fp32 != in[i - 1].fp32) prepare(in[i], begin, end);
    };
    if (M > SOLO)
      me.share(M, 1, fill);
    else if (!me.late(units))
      fill(0, M);
    return in;
  }

  struct Range {
    int64_t begin, end;
  };

  // Units [begin, end) of a linear's outputs, into y (M, N).
  Range multiply(const Linear& linear, const Inputs& in, T* y, int64_t begin, int64_t end) {
    const auto& [w, method] = linear;
    method.multiply(w, in, {y, IS_BF16, w.N}, begin, end);
    return {begin * method.outputs, std::min(end * method.outputs, w.N)};
  }

  // Rotates the pairs of outputs `n` of heads (M, heads D), from `from` to where `to` says.
  template <class F>
  void rotate(const T* from, int64_t heads, Range n, const F& to) {
    each_part(n, [&](int64_t m, int64_t i, int64_t count) {
      const float* turn = turns_ + m % turn_rows_ * sizes_.D + i % sizes_.D;
      const T* a = from + m * heads * sizes_.D + i;
      pointwise::kernels(IS_BF16).rotate({count, 0, a, turn, to(m, i)}, 0, 1);
    });
  }

  // Calls f(m, i, count) for the outputs `n` of each row, divided at the ends of heads.
  template <class F>
  void each_part(Range n, const F& f) {
    for (int64_t m = 0; m < sizes_.M; m++)
      for (int64_t i = n.begin, next; i < n.end; i = next) {
        next = std::min((i / sizes_.D + 1) * sizes_.D, n.end);
        f(m, i, next - i);
      }
  }

  // Where number i of row m's keys or values is in the cache.
  T* key(const Block& b, int64_t m, int64_t i) const {
    return reinterpret_cast<T*>(b.keys) + cached(job_.key_strides, m, i);
  }

  T* value(const Block& b, int64_t m, int64_t i) const {
    return reinterpret_cast<T*>(b.values) + cached(job_.value_strides, m, i);
  }

  int64_t cached(const int64_t* strides, int64_t m, int64_t i) const {
    const int64_t row = m / sizes_.T, t = m % sizes_.T;
    const int64_t position = job_.positions[row * job_.position_stride + t];
    return row * strides[0] + position * strides[1] + i / sizes_.D * strides[2] + i % sizes_.D;
  }

  static T* at(T* rows, int64_t m, int64_t width, int64_t i) { return rows + m * width + i; }

  static int64_t upper(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

  static int64_t least(const Linear& linear) {
    return std::max<int64_t>(1, LEAST / (linear.method.outputs * row_bytes(linear.w) + 1));
  }

  template <class U>
  U* take(int64_t count) {
    memory_.emplace_back(new Line[count * sizeof(U) / 64 + 1]);
    return reinterpret_cast<U*>(memory_.back().get());
  }

  static constexpr bool IS_BF16 = !std::is_same_v<T, float>;

  const Sizes sizes_;
  const std::vector<Block>& blocks_;
  attention::Job job_;
  const attention::Shape shape_;
  T* const x_;
  const float* const turns_;
  const int64_t turn_rows_;
  Team team_;
  std::vector<std::unique_ptr<Line[]>> memory_;
  T *q_, *k_, *v_, *attended_, *y_, *gate_, *up_;
  std::vector<attention::Task> tasks_;
  int64_t parts_;
  float* sums_;  // what each task has computed
  std::vector<std::atomic<int64_t>> left_;  // parts to compute, of each `parts_` tasks
  // For each thread: normed rows, what `prepare` makes of them, and attention's keys and values.
  std::vector<T*> normed_;
  std::vector<char*> forms_;
  std::vector<float*> blocks_of_cache_;
  int64_t form_bytes_;
};
}  // namespace

namespace llama3 {
void run_step(const Sizes& sizes, const std::vector<Block>& blocks, const attention::Job& cache,
              void* x, bool is_bf16, const float* turns, int64_t turn_rows) {
  if (is_bf16)
    Step<BFloat16>(sizes, blocks, cache, static_cast<BFloat16*>(x), turns, turn_rows).run();
  else
    Step<float>(sizes, blocks, cache, static_cast<float*>(x), turns, turn_rows).run();
}
}  // namespace llama3
