// Torch operators of weights in blocks of 4 or 6 bits: y = x W^T, and the dequantized weight. Knows
// nothing about models. The arithmetic is in blocks_vnni.h and, for other processors, in blocks.h.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>

#include "activations.h"
#include "block_layout.h"

#define ARITHMETIC "blocks.h"
#include "variants.h"

namespace {
using at::Tensor;
using llama3::Activations;
using llama3::BlockView;
using llama3::BlockWeights;
using llama3::Outputs;
