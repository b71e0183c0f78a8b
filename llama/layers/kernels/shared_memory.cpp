// Collectives of the ranks of one machine, through memory that all of them have mapped. Knows
// nothing about models, nor how the memory came about: llama/distributed/shared_memory.py does that.
//
// The memory begins with a control block and one state for each rank. Then each rank has two
// buffers, for even and odd pieces of a tensor. A rank copies its piece number n into its own
// buffer n % 2 and publishes n; when all others have published n it reads all buffers. It has
// finished reading piece n when it publishes n + 1; so a buffer is written again, for piece n + 2,
// only after every rank has published n + 1.

#include "processor.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <ctime>

namespace {
using at::Tensor;
using Clock = std::chrono::steady_clock;

constexpr int64_t CONTROL_BYTES = 4096, STATE_BYTES = 128, ALIGN = 4096;
constexpr auto SPIN = std::chrono::microseconds(50);  // then a waiting rank sleeps
constexpr long NAP_NS = 20'000'000;  // after which it looks whether the awaited rank still lives
constexpr int64_t BLOCK = 256;       // numbers that are summed at once

struct Control {
  std::atomic<uint32_t> closed;  // 1: a rank has left
};
struct Call {  // what a rank computes; it must be the same on all
  uint64_t kind, bytes;
  bool operator==(const Call&) const = default;
};
struct alignas(STATE_BYTES) State {
  std::atomic<uint32_t> published;  // number of the last piece
  std::atomic<uint32_t> sleepers;
  Call calls[2];  // of the pieces in the buffers
};
static_assert(sizeof(State) == STATE_BYTES && std::atomic<uint32_t>::is_always_lock_free);

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}

class Ranks {
 public:
  Ranks(const Tensor& memory, int64_t rank, int64_t ranks, int64_t file, double timeout)
      : start_(static_cast<char*>(memory.data_ptr())), rank_(rank), ranks_(ranks), file_(file),
        timeout_(timeout) {
    TORCH_CHECK(memory.device().is_cpu() && memory.scalar_type() == at::kByte &&
                    memory.dim() == 1 && memory.is_contiguous(),
                "the memory must be a vector of bytes on the CPU");
    TORCH_CHECK(ranks > 1 && rank >= 0 && rank < ranks, "no rank ", rank, " of ", ranks);
    header_ = (CONTROL_BYTES + ranks * STATE_BYTES + ALIGN - 1) / ALIGN * ALIGN;
    piece_ = (memory.numel() - header_) / (2 * ranks) / ALIGN * ALIGN;
    TORCH_CHECK(piece_ > 0, "the memory is too small for ", ranks, " ranks");
    TORCH_CHECK(reinterpret_cast<uintptr_t>(start_) % ALIGN == 0, "the memory is not aligned");
  }

  // Publish `bytes` bytes at `own` piece by piece, and call use(offset, size, buffer) for each
  // piece that all ranks have published. buffer(r) has the piece of rank r.
  template <typename Use>
  void exchange(const Call& call, const char* own, const Use& use) {
    State& state = state_of(rank_);
    for (int64_t offset = 0; offset < static_cast<int64_t>(call.bytes); offset += piece_) {
      const int64_t size = std::min(piece_, static_cast<int64_t>(call.bytes) - offset);
      const uint32_t number = state.published.load(std::memory_order_relaxed) + 1;
      std::memcpy(buffer(rank_, number), own + offset, size);
      state.calls[number % 2] = call;
      state.published.store(number, std::memory_order_seq_cst);
      if (state.sleepers.load(std::memory_order_seq_cst) != 0)
        futex(state.published, FUTEX_WAKE, INT32_MAX, nullptr);
      for (int64_t r = 0; r < ranks_; r++)
        if (r != rank_) wait(r, number);
      for (int64_t r = 0; r < ranks_; r++)
        TORCH_CHECK(state_of(r).calls[number % 2] == call, "ranks ", rank_, " and ", r,
                    " called different collectives, or with tensors of other shapes or dtypes");
      use(offset, size, [&](int64_t r) -> const char* { return buffer(r, number); });
    }
  }

 private:
  State& state_of(int64_t r) { return reinterpret_cast<State*>(start_ + CONTROL_BYTES)[r]; }
  char* buffer(int64_t r, uint32_t number) {
    return start_ + header_ + (2 * r + number % 2) * piece_;
  }
  bool has_published(int64_t r, uint32_t number) {  // numbers may wrap around
    return static_cast<int32_t>(state_of(r).published.load(std::memory_order_acquire) - number) >=
           0;
  }

  void wait(int64_t r, uint32_t number) {
    const auto start = Clock::now();
    while (Clock::now() - start < SPIN)
      for (int i = 0; i < 32; i++) {
        if (has_published(r, number)) return;
        llama3::pause();
      }
    const timespec nap{0, NAP_NS};
    State& state = state_of(r);
    while (true) {
      state.sleepers.fetch_add(1, std::memory_order_seq_cst);
      const uint32_t seen = state.published.load(std::memory_order_seq_cst);
      if (static_cast<int32_t>(seen - number) < 0)
        futex(state.published, FUTEX_WAIT, seen, &nap);
      state.sleepers.fetch_sub(1, std::memory_order_seq_cst);
      if (has_published(r, number)) return;
      check(r, number, start);
    }
  }

  // Throw if rank r has not published and never will. Its end is looked for first: it may have
  // published and ended since the caller looked.
  void check(int64_t r, uint32_t number, Clock::time_point start) {
    const auto& control = *reinterpret_cast<Control*>(start_);
    const bool closed = control.closed.load(), alive = lives(r);
    if (has_published(r, number)) return;
    if (closed) C10_THROW_ERROR(DistBackendError, "a rank has left the job");
    if (!alive)
      C10_THROW_ERROR(DistBackendError, c10::str("rank ", r, " of the group has ended"));
    if (std::chrono::duration<double>(Clock::now() - start).count() > timeout_)
      C10_THROW_ERROR(DistBackendError, c10::str("rank ", r, " of the group did not answer within ",
                                                 timeout_, " s"));
  }

  // Each rank locks the byte of its number in its own open file; the kernel ends that with it.
  bool lives(int64_t r) {
    struct flock lock {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = r;
    lock.l_len = 1;
    return fcntl(static_cast<int>(file_), F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
  }

  char* start_;
  int64_t rank_, ranks_, file_, header_, piece_;
  double timeout_;
};

// What all ranks must agree on: the operator, and x's dtype and shape.
Call call_of(uint64_t op, const Tensor& x) {
  uint64_t kind = op * 64 + static_cast<uint64_t>(x.scalar_type());
  for (const int64_t size : x.sizes()) kind = (kind ^ static_cast<uint64_t>(size)) * 1099511628211u;
  return {kind, static_cast<uint64_t>(x.nbytes())};
}

template <typename T, typename Buffer>
void add(int64_t ranks, const Buffer& buffer, int64_t n, T* y) {
  float sums[BLOCK];
  for (int64_t i = 0; i < n; i += BLOCK) {
    const int64_t width = std::min(BLOCK, n - i);
    std::fill(sums, sums + width, 0.0f);
    for (int64_t r = 0; r < ranks; r++) {
      const T* x = reinterpret_cast<const T*>(buffer(r)) + i;
      for (int64_t j = 0; j < width; j++) sums[j] += static_cast<float>(x[j]);
    }
    for (int64_t j = 0; j < width; j++) y[i + j] = static_cast<T>(sums[j]);
  }
}

// The sum of all ranks' x (fp32 or bf16), added in fp32 in the order of ranks: the same bits on all.
Tensor sum_over_ranks(const Tensor& x_any, const Tensor& memory, int64_t rank, int64_t ranks,
                      int64_t file, double timeout) {
  const auto dtype = x_any.scalar_type();
  TORCH_CHECK(x_any.device().is_cpu() && (dtype == at::kFloat || dtype == at::kBFloat16),
              "x must be fp32 or bf16 on the CPU, not ", dtype);
  Ranks group(memory, rank, ranks, file, timeout);
  const Tensor x = x_any.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  group.exchange(call_of(1, x), static_cast<const char*>(x.const_data_ptr()),
                 [&](int64_t offset, int64_t size, const auto& buffer) {
                   if (dtype == at::kFloat)
                     add(ranks, buffer, size / 4, reinterpret_cast<float*>(out + offset));
                   else
                     add(ranks, buffer, size / 2, reinterpret_cast<c10::BFloat16*>(out + offset));
                 });
  return y;
}

// All ranks' x, of any dtype, below each other: (ranks, ...).
Tensor stack_over_ranks(const Tensor& x_any, const Tensor& memory, int64_t rank, int64_t ranks,
                        int64_t file, double timeout) {
  TORCH_CHECK(x_any.device().is_cpu(), "x must be on the CPU");
  Ranks group(memory, rank, ranks, file, timeout);
  const Tensor x = x_any.contiguous();
  std::vector<int64_t> shape{ranks};
  shape.insert(shape.end(), x.sizes().begin(), x.sizes().end());
  Tensor y = at::empty(shape, x.options());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  group.exchange(call_of(2, x), static_cast<const char*>(x.const_data_ptr()),
                 [&](int64_t offset, int64_t size, const auto& buffer) {
                   for (int64_t r = 0; r < ranks; r++)
                     std::memcpy(out + r * x.nbytes() + offset, buffer(r), size);
                 });
  return y;
}

// Tell the other ranks that this one does not come back.
void leave_ranks(const Tensor& memory) {
  TORCH_CHECK(memory.numel() >= CONTROL_BYTES, "the memory is too small");
  static_cast<Control*>(memory.data_ptr())->closed.store(1);
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(llama3, m) {
  m.def("sum_over_ranks(Tensor x, Tensor memory, int rank, int ranks, int file, float timeout) -> Tensor");
  m.def("stack_over_ranks(Tensor x, Tensor memory, int rank, int ranks, int file, float timeout) -> Tensor");
  m.def("leave_ranks(Tensor memory) -> ()");
}
TORCH_LIBRARY_IMPL(llama3, CPU, m) {
  m.impl("sum_over_ranks", sum_over_ranks);
  m.impl("stack_over_ranks", stack_over_ranks);
  m.impl("leave_ranks", leave_ranks);
}
