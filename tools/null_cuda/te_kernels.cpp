// Transformer Engine's kernels on the CPU, for `run.py --compute`: what its PyTorch extension asks of
// libtransformer_engine.so when it trains a Llama on a Hopper or Blackwell GPU, in bf16 or FP8.
//
// Preloaded, these take the place of the library's functions of the same name; the extension above them (quantizers,
// shapes, workspaces) and all of TE's Python stay TE's own. Each function is the plain form of the kernel in the file
// of Transformer Engine 2.12 that is named before it. An argument outside what is needed here throws.

#include "te_tensors.h"

#include <transformer_engine/cast.h>
#include <transformer_engine/fused_attn.h>
#include <transformer_engine/fused_rope.h>
#include <transformer_engine/gemm.h>
#include <transformer_engine/multi_tensor.h>
#include <transformer_engine/normalization.h>
#include <transformer_engine/recipe.h>
#include <transformer_engine/swizzle.h>
#include <transformer_engine/transpose.h>

#include <cstring>
#include <utility>

using namespace te;

namespace {

// An operand of a product as [rows, k]. Hopper multiplies FP8 only along the last axis of both operands, for which
// "column-wise data" is a transposed copy (gemm/cublaslt_gemm.cu: CanonicalizeGemmInput).
Matrix operand(NVTETensor tensor, bool k_is_last) {
  NVTEScalingMode mode = nvte_tensor_scaling_mode(tensor);
  bool any_axis = !is_fp8(tensor) || (mode == NVTE_DELAYED_TENSOR_SCALING && nvte_is_non_tn_fp8_gemm_supported() &&
                                      nvte_tensor_data(tensor));
  if (any_axis || k_is_last) {
    Matrix matrix = read(tensor, kNVTERowwiseData);
    return k_is_last ? matrix : transposed(matrix);
  }
  Matrix matrix = read(tensor, kNVTEColumnwiseData);
  return mode == NVTE_MXFP8_1D_SCALING ? transposed(matrix) : matrix;
}

template <class T>
T attribute(NVTEQuantizationConfig config, NVTEQuantizationConfigAttribute which) {
  T value{};
  size_t written;
  if (config) nvte_get_quantization_config_attribute(config, which, &value, sizeof value, &written);
  return value;
}

bool is_noop(NVTEQuantizationConfig config) {
  auto flag = attribute<NVTETensor>(config, kNVTEQuantizationConfigNoopTensor);
  return flag && nvte_tensor_data(flag) && *static_cast<float*>(nvte_tensor_data(flag)) == 1.0f;
}

ScaleRule rule(NVTEQuantizationConfig config) {
  return {attribute<float>(config, kNVTEQuantizationConfigAmaxEpsilon),
          static_cast<bool>(attribute<uint8_t>(config, kNVTEQuantizationConfigForcePow2Scales))};
}

// Norms are called twice: for the size of their workspace, then with it.
bool is_question(NVTETensor workspace) {
  if (nvte_tensor_data(workspace)) return false;
  describe(workspace, {16}, kNVTEByte);
  return true;
}

// [rows, columns, ...] as [columns, rows, ...].
void swap_axes(NVTETensor input, NVTETensor output, size_t rows, size_t columns) {
  size_t bytes = nvte_tensor_numel(input) / (rows * columns) * nvte_tensor_element_size(input);
  auto *from = static_cast<char*>(nvte_tensor_data(input)), *to = static_cast<char*>(nvte_tensor_data(output));
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j < columns; ++j)
      std::memcpy(to + (j * rows + i) * bytes, from + (i * columns + j) * bytes, bytes);
}

// (fused_rope/fused_rope.cu) The backward turns the other way.
void rotate(NVTETensor input, NVTETensor freqs, NVTETensor output, NVTE_QKV_Format format, bool interleaved, int s,
            int b, int h, int d, int d2, int stride_s, int stride_b, int stride_h, int stride_d, float direction) {
  require(format == NVTE_SBHD && !interleaved && d2 == d, "rotation of this layout");
  Elements in(input), out(output), angle(freqs);
  for (int i = 0; i < s; ++i)
    for (int j = 0; j < b; ++j)
      for (int k = 0; k < h; ++k)
        for (int l = 0; l < d; ++l) {
          size_t head = size_t(i) * stride_s + size_t(j) * stride_b + size_t(k) * stride_h;
          float a = angle[size_t(i) * d + l];
          float here = in[head + size_t(l) * stride_d];
          float there = in[head + size_t(l < d / 2 ? l + d / 2 : l - d / 2) * stride_d];
          float sign = (l < d / 2 ? -1 : 1) * direction;
          out.set(((size_t(i) * b + j) * h + k) * d + l, here * std::cos(a) + sign * there * std::sin(a));
        }
}

// Documents of a tensor over context-parallel ranks: calls f(token among halves, token of the whole tensor).
template <class F>
void each_half_token(NVTETensor cu_seqlens, int half, F f) {
  Elements bounds(cu_seqlens);
  for (size_t i = 0; i + 1 < bounds.size(); ++i)
    for (size_t t = bounds.integer(i) / 2; t < bounds.integer(i + 1) / 2; ++t)
      f(t, t + bounds.integer(i + half) / 2);
}

// [..., tokens, heads, head_dim]: tokens, numbers of a token, and how many such arrays.
struct Tokens {
  size_t count, width, arrays;
  explicit Tokens(NVTETensor tensor) {
    NVTEShape shape = nvte_tensor_shape(tensor);
    count = shape.data[shape.ndim - 3], width = shape.data[shape.ndim - 2] * shape.data[shape.ndim - 1];
    arrays = shape.ndim == 4 ? shape.data[0] : 1;
  }
};

// Adds the attention to one step's keys to that to those of earlier steps, which becomes a share of the whole too where
// `old_lse` tells how large (attention/context_parallel: out_correction).
void add_step(NVTETensor out, NVTETensor out_per_step, NVTETensor old_lse, NVTETensor lse, NVTETensor lse_per_step,
              NVTETensor cu_seqlens, bool only_second_half) {
  Elements all(out), step(out_per_step), all_lse(lse), step_lse(lse_per_step), old(old_lse ? old_lse : lse);
  size_t heads = nvte_tensor_size(out, 1), head_dim = nvte_tensor_size(out, 2);
  size_t length = nvte_tensor_size(lse, 1), step_length = nvte_tensor_size(lse_per_step, 1);
  auto scaled = [](float value, float share) { return value == 0 ? 0 : value * share; };
  auto add = [&](size_t token, size_t whole) {
    for (size_t head = 0; head < heads; ++head) {
      float share = std::exp(step_lse[head * step_length + token] - all_lse[head * length + whole]);
      float kept = std::exp(old[head * length + whole] - all_lse[head * length + whole]);
      for (size_t i = 0; i < head_dim; ++i) {
        size_t at = (whole * heads + head) * head_dim + i;
        all.set(at, scaled(all[at], kept) + scaled(step[(token * heads + head) * head_dim + i], share));
      }
    }
  };
  if (only_second_half) return each_half_token(cu_seqlens, 1, add);
  Elements bounds(cu_seqlens);
  for (size_t token = 0; token < bounds.integer(bounds.size() - 1); ++token) add(token, token);
}

// Between documents one after another and the ranks' slices one after another, of which each holds two of every
// document's 2 * ranks chunks: its own from the front and its own from the back.
// `direction` takes (a token among documents, the same among slices) to (where it is, where it goes).
template <class Direction>
void reorder(NVTETensor input, NVTETensor cu_seqlens, NVTETensor output, size_t ranks, Direction direction) {
  Elements bounds(cu_seqlens);
  size_t bytes = nvte_tensor_numel(input) / nvte_tensor_size(input, 0) * nvte_tensor_element_size(input), slice = 0;
  auto *source = static_cast<char*>(nvte_tensor_data(input)), *target = static_cast<char*>(nvte_tensor_data(output));
  for (size_t rank = 0; rank < ranks; ++rank)
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      size_t chunk = (bounds.integer(i + 1) - bounds.integer(i)) / (2 * ranks);
      for (size_t number : {rank, 2 * ranks - 1 - rank})
        for (size_t token = 0; token < chunk; ++token, ++slice) {
          auto [from, to] = direction(bounds.integer(i) + number * chunk + token, slice);
          std::memcpy(target + to * bytes, source + from * bytes, bytes);
        }
    }
}

}  // namespace

extern "C" {

// D [n, m] = alpha * B [n, k] @ A [m, k]^T + beta * C (gemm/cublaslt_gemm.cu)
void nvte_cublas_gemm_v2(int transa, int transb, const float* alpha, const NVTETensor A, const NVTETensor B,
                         const float* beta, const NVTETensor C, NVTETensor D, NVTETensor, NVTEMatmulConfig config,
                         cudaStream_t) {
  NVTETensor bias = nullptr;
  size_t written;
  nvte_get_matmul_config_attribute(config, kNVTEMatmulConfigBiasTensor, &bias, sizeof bias, &written);
  require(!bias || !nvte_tensor_data(bias), "a product with a bias");
  Matrix a = operand(A, transa), b = operand(B, !transb);
  require(a.columns == b.columns, "a product of other shapes");
  if (is_fp8(A)) require(a.columns % 16 == 0, "an FP8 product along an axis that is no multiple of 16");
  Elements d(D), c(C);
  require(!is_fp8(D) && d.size() == a.rows * b.rows, "a product into this output");
  for (size_t i = 0; i < b.rows; ++i)
    for (size_t j = 0; j < a.rows; ++j) {
      float sum = 0;
      for (size_t k = 0; k < a.columns; ++k) sum += a.at(j, k) * b.at(i, k);
      size_t at = i * a.rows + j;
      d.set(at, *alpha * sum + (*beta ? *beta * c[at] : 0));
    }
}

// (cast/, transpose/)
void nvte_quantize_v2(const NVTETensor input, NVTETensor output, const NVTEQuantizationConfig config, cudaStream_t) {
  if (!is_noop(config)) write(output, read(input, kNVTERowwiseData), rule(config));
}

void nvte_dequantize(const NVTETensor input, NVTETensor output, cudaStream_t) {
  write(output, read(input, kNVTERowwiseData), {});
}

void nvte_transpose(const NVTETensor input, NVTETensor output, cudaStream_t) {
  NVTEShape shape = nvte_tensor_shape(input);
  size_t size = nvte_tensor_numel(input), columns = shape.data[shape.ndim - 1];
  if (size) swap_axes(input, output, size / columns, columns);
}

void nvte_swap_first_dims(const NVTETensor input, NVTETensor output, cudaStream_t) {
  NVTEShape shape = nvte_tensor_shape(input);
  if (nvte_tensor_numel(input)) swap_axes(input, output, shape.data[0], shape.data[1]);
}

void nvte_memset(void* at, int value, size_t size, cudaStream_t) { std::memset(at, value, size); }

// (swizzle/swizzle.cu) The order in which tensor cores take MXFP8's scales; here they stay in that of the matrix.
void nvte_swizzle_scaling_factors(const NVTETensor input, NVTETensor output, cudaStream_t) {
  for (NVTETensorParam which : {kNVTERowwiseScaleInv, kNVTEColumnwiseScaleInv}) {
    NVTEBasicTensor from = part(input, which), to = part(output, which);
    if (to.data_ptr) std::memcpy(to.data_ptr, from.data_ptr, Elements(from).size());
  }
}

// (recipe/current_scaling.cu)
void nvte_compute_amax_with_config(const NVTETensor input, NVTETensor output, const NVTEQuantizationConfig config,
                                   cudaStream_t) {
  if (is_noop(config)) return;
  float* amax = scalar(output, kNVTEAmax);
  *(amax ? amax : scalar(output, kNVTEColumnwiseAmax)) = largest(read(input, kNVTERowwiseData));
}

void nvte_compute_amax(const NVTETensor input, NVTETensor output, cudaStream_t stream) {
  nvte_compute_amax_with_config(input, output, nullptr, stream);
}

void nvte_compute_scale_from_amax(NVTETensor output, const NVTEQuantizationConfig config, cudaStream_t) {
  if (!is_noop(config))
    *scalar(output, kNVTEScale) = scale_of(*scalar(output, kNVTEAmax), fp8_max(nvte_tensor_type(output)), rule(config));
}

// (recipe/delayed_scaling.cu) A history is [length, scales]; row 0 takes this step's maximum.
void nvte_delayed_scaling_recipe_amax_and_scale_update_after_reduction(
    const NVTETensor reduced, std::vector<NVTETensor> histories, std::vector<NVTETensor> scales, const char* algorithm,
    NVTEDType dtype, float margin, cudaStream_t) {
  size_t offset = 0;
  auto* buffer = static_cast<float*>(nvte_tensor_data(reduced));
  for (size_t i = 0; i < histories.size(); ++i) {
    auto* history = static_cast<float*>(nvte_tensor_data(histories[i]));
    auto* scale = static_cast<float*>(nvte_tensor_data(scales[i]));
    size_t length = nvte_tensor_size(histories[i], 0), stride = nvte_tensor_size(histories[i], 1);
    for (size_t j = 0; j < stride; ++j, ++offset) {
      float last = buffer && buffer[offset] != 0 ? buffer[offset] : history[j], amax = 0;
      if (last != 0) {
        for (size_t row = 0; row < length; ++row) {
          float next = row + 1 < length ? history[(row + 1) * stride + j] : last;
          amax = std::max(amax, next);
          history[row * stride + j] = row ? next : 0;
        }
      }
      if (!std::strcmp(algorithm, "most_recent")) amax = last;
      if (std::isfinite(amax) && amax > 0)
        scale[j] = std::min(fp8_max(dtype) * std::exp2(-margin) / amax, std::numeric_limits<float>::max());
    }
  }
}

// (normalization/rmsnorm/)
void nvte_rmsnorm_fwd(const NVTETensor x, const NVTETensor gamma, const float epsilon, NVTETensor z, NVTETensor rsigma,
                      NVTETensor workspace, const int, const bool zero_centered, cudaStream_t) {
  if (is_question(workspace)) return;
  require(!zero_centered, "a norm around one");
  Matrix in = read(x, kNVTERowwiseData);
  Elements weight(gamma), inverse(rsigma);
  for (size_t i = 0; i < in.rows; ++i) {
    float squares = 0;
    for (size_t j = 0; j < in.columns; ++j) squares += in.at(i, j) * in.at(i, j);
    float r = 1 / std::sqrt(squares / in.columns + epsilon);
    inverse.set(i, r);
    for (size_t j = 0; j < in.columns; ++j) in.at(i, j) *= r * weight[j];
  }
  write(z, in, {});
}

void nvte_rmsnorm_bwd(const NVTETensor dz, const NVTETensor x, const NVTETensor rsigma, const NVTETensor gamma,
                      NVTETensor dx, NVTETensor dgamma, NVTETensor workspace, const int, const bool zero_centered,
                      cudaStream_t) {
  if (is_question(workspace)) return;
  require(!zero_centered, "a norm around one");
  Matrix out = read(dz, kNVTERowwiseData), in = read(x, kNVTERowwiseData);
  Elements weight(gamma), inverse(rsigma), dweight(dgamma);
  std::vector<float> sums(in.columns);
  for (size_t i = 0; i < in.rows; ++i) {
    float r = inverse[i], mean = 0;
    for (size_t j = 0; j < in.columns; ++j) mean += out.at(i, j) * weight[j] * in.at(i, j) * r / in.columns;
    for (size_t j = 0; j < in.columns; ++j) {
      float normed = in.at(i, j) * r;
      sums[j] += out.at(i, j) * normed;
      in.at(i, j) = r * (out.at(i, j) * weight[j] - normed * mean);
    }
  }
  write(dx, in, {});
  for (size_t j = 0; j < in.columns; ++j) dweight.set(j, sums[j]);
}

void nvte_fused_rope_forward(const NVTETensor input, const NVTETensor, const NVTETensor freqs, const NVTETensor,
                             NVTETensor output, const NVTE_QKV_Format format, const bool interleaved, const int,
                             const int, const int s, const int b, const int h, const int d, const int d2,
                             const int stride_s, const int stride_b, const int stride_h, const int stride_d,
                             cudaStream_t) {
  rotate(input, freqs, output, format, interleaved, s, b, h, d, d2, stride_s, stride_b, stride_h, stride_d, 1);
}

void nvte_fused_rope_backward(const NVTETensor grads, const NVTETensor, const NVTETensor freqs, const NVTETensor,
                              NVTETensor input_grads, const NVTE_QKV_Format format, const bool interleaved, const int,
                              const int, const int s, const int b, const int h, const int d, const int d2,
                              const int stride_s, const int stride_b, const int stride_h, const int stride_d,
                              cudaStream_t) {
  rotate(grads, freqs, input_grads, format, interleaved, s, b, h, d, d2, stride_s, stride_b, stride_h, stride_d, -1);
}

// (fused_attn/utils.cu) The state of dropout, which no layer here has.
void nvte_extract_seed_and_offset(int64_t* state, int captured, int64_t*, uint64_t seed, int64_t*, uint64_t offset,
                                  uint32_t, cudaStream_t) {
  require(!captured, "in a CUDA graph");
  state[0] = seed, state[1] = offset;
}

// What follows is TE's exchange over context-parallel ranks (fused_attn/context_parallel.cu). Log-sum-exps are
// [heads, tokens], tokens those of the tensor they belong to.

void nvte_cp_thd_read_half_tensor(const NVTETensor& tensor, const NVTETensor& cu_seqlens, NVTETensor half, int half_idx,
                                  cudaStream_t) {
  Tokens tokens(tensor);
  size_t bytes = tokens.width * nvte_tensor_element_size(tensor);
  auto *from = static_cast<char*>(nvte_tensor_data(tensor)), *to = static_cast<char*>(nvte_tensor_data(half));
  for (size_t i = 0; i < tokens.arrays; ++i)
    each_half_token(cu_seqlens, half_idx, [&](size_t token, size_t whole) {
      std::memcpy(to + (i * tokens.count / 2 + token) * bytes, from + (i * tokens.count + whole) * bytes, bytes);
    });
}

void nvte_cp_thd_second_half_lse_correction(NVTETensor lse, const NVTETensor& lse_per_step,
                                            const NVTETensor& cu_seqlens, int packed, cudaStream_t) {
  require(packed, "log-sum-exps per document");
  Elements all(lse), step(lse_per_step);
  size_t length = nvte_tensor_size(lse, 1), half_length = nvte_tensor_size(lse_per_step, 1);
  for (size_t head = 0; head < nvte_tensor_size(lse, 0); ++head)
    each_half_token(cu_seqlens, 1, [&](size_t token, size_t whole) {
      float a = all[head * length + whole], b = step[head * half_length + token];
      all.set(head * length + whole, std::max(a, b) + std::log1p(std::exp(std::min(a, b) - std::max(a, b))));
    });
}

void nvte_cp_thd_read_second_half_lse(const NVTETensor& lse, const NVTETensor& cu_seqlens, NVTETensor half_lse,
                                      int packed, int half_length, cudaStream_t) {
  require(packed, "log-sum-exps per document");
  Elements all(lse), half(half_lse);
  for (size_t head = 0; head < nvte_tensor_size(lse, 0); ++head)
    each_half_token(cu_seqlens, 1, [&](size_t token, size_t whole) {
      half.set(head * half_length + token, all[head * nvte_tensor_size(lse, 1) + whole]);
    });
}

#ifdef TE_2_20  // adds one step after another, and orders tokens in kernels

void nvte_cp_thd_out_correction(NVTETensor out, const NVTETensor& out_per_step, const NVTETensor& old_lse,
                                const NVTETensor& lse, const NVTETensor& lse_per_step, const NVTETensor& cu_seqlens,
                                int only_second_half, int packed, cudaStream_t) {
  require(packed, "log-sum-exps per document");
  add_step(out, out_per_step, old_lse, lse, lse_per_step, cu_seqlens, only_second_half);
}

void nvte_thd_sequence_order_to_cp_rank_order(const NVTETensor& inp, const NVTETensor& cu_seqlens, NVTETensor out,
                                              int world_size, int, cudaStream_t) {
  reorder(inp, cu_seqlens, out, world_size, [](size_t document, size_t slice) { return std::pair(document, slice); });
}

void nvte_thd_cp_rank_order_to_sequence_order(const NVTETensor& inp, const NVTETensor& cu_seqlens, NVTETensor out,
                                              int world_size, int, cudaStream_t) {
  reorder(inp, cu_seqlens, out, world_size, [](size_t document, size_t slice) { return std::pair(slice, document); });
}

#else

void nvte_cp_thd_out_correction(NVTETensor out, const NVTETensor& out_per_step, const NVTETensor& lse,
                                const NVTETensor& lse_per_step, const NVTETensor& cu_seqlens, int only_second_half,
                                int packed, cudaStream_t) {
  require(packed, "log-sum-exps per document");
  add_step(out, out_per_step, nullptr, lse, lse_per_step, cu_seqlens, only_second_half);
}

#endif

void nvte_cp_thd_grad_correction(NVTETensor grad, const NVTETensor& grad_per_step, const NVTETensor& cu_seqlens,
                                 const char* first_half, const char* second_half, cudaStream_t) {
  Elements all(grad), step(grad_per_step);
  Tokens tokens(grad), steps(grad_per_step);
  auto apply = [&](const char* what, size_t token, size_t whole) {
    for (size_t i = 0; i < tokens.arrays * tokens.width && std::strcmp(what, "none"); ++i) {
      size_t array = i / tokens.width, j = i % tokens.width;
      size_t at = (array * tokens.count + whole) * tokens.width + j;
      float part = step[(array * steps.count + token) * tokens.width + j];
      all.set(at, std::strcmp(what, "add") ? part : all[at] + part);
    }
  };
  // One of them "none": the step is of the other half's tokens only.
  bool whole_step = std::strcmp(first_half, "none") && std::strcmp(second_half, "none");
  for (int half : {0, 1})
    each_half_token(cu_seqlens, half, [&](size_t token, size_t whole) {
      apply(half ? second_half : first_half, whole_step ? whole : token, whole);
    });
}

// (multi_tensor/)
void nvte_multi_tensor_adam_cuda(int, NVTETensor, NVTETensor** lists, const size_t num_lists, const size_t num_tensors,
                                 const float lr, const float beta1, const float beta2, const float epsilon,
                                 const int step, const int mode, const int bias_correction, const float weight_decay,
                                 cudaStream_t) {
  require(num_lists == 4 && mode == 1, "Adam in this form");
  float correction1 = bias_correction ? 1 - std::pow(beta1, step) : 1;
  float correction2 = bias_correction ? 1 - std::pow(beta2, step) : 1;
  for (size_t i = 0; i < num_tensors; ++i) {
    Elements g(lists[0][i]), p(lists[1][i]), m(lists[2][i]), v(lists[3][i]);
    for (size_t j = 0; j < p.size(); ++j) {
      m.set(j, beta1 * m[j] + (1 - beta1) * g[j]);
      v.set(j, beta2 * v[j] + (1 - beta2) * g[j] * g[j]);
      float update = m[j] / correction1 / (std::sqrt(v[j] / correction2) + epsilon);
      p.set(j, p[j] - lr * (update + weight_decay * p[j]));
    }
  }
}

void nvte_multi_tensor_l2norm_cuda(int, NVTETensor, NVTETensor** lists, const size_t, const size_t num_tensors,
                                   NVTETensor, NVTETensor, NVTETensor ret, NVTETensor ret_per_tensor, int per_tensor,
                                   int, cudaStream_t) {
  float total = 0;
  for (size_t i = 0; i < num_tensors; ++i) {
    Elements values(lists[0][i]);
    float squares = 0;
    for (size_t j = 0; j < values.size(); ++j) squares += values[j] * values[j];
    if (per_tensor) Elements(ret_per_tensor).set(i, std::sqrt(squares));
    total += squares;
  }
  Elements(ret).set(0, std::sqrt(total));
}

void nvte_multi_tensor_scale_cuda(int, NVTETensor noop, NVTETensor** lists, const size_t, const size_t num_tensors,
                                  float scale, cudaStream_t) {
  for (size_t i = 0; i < num_tensors; ++i) {
    Elements in(lists[0][i]), out(lists[1][i]);
    for (size_t j = 0; j < in.size(); ++j) {
      if (!std::isfinite(in[j])) *static_cast<int*>(nvte_tensor_data(noop)) = 1;
      out.set(j, in[j] * scale);
    }
  }
}

#ifdef TE_2_20
void nvte_multi_tensor_scale_tensor_cuda(int chunk_size, NVTETensor noop, NVTETensor** lists, const size_t num_lists,
                                         const size_t num_tensors, NVTETensor scale, cudaStream_t stream) {
  nvte_multi_tensor_scale_cuda(chunk_size, noop, lists, num_lists, num_tensors, Elements(scale)[0], stream);
}
#endif

void nvte_multi_tensor_compute_scale_and_scale_inv_cuda(int, NVTETensor, NVTETensor** lists, const size_t,
                                                        const size_t num_tensors, float max_fp8, int power_of_2,
                                                        float epsilon, cudaStream_t) {
  for (size_t i = 0; i < num_tensors; ++i) {
    Elements amax(lists[0][i]), scale(lists[1][i]), inverse(lists[2][i]);
    for (size_t j = 0; j < amax.size(); ++j) {
      scale.set(j, scale_of(amax[j], max_fp8, {epsilon, power_of_2 != 0}));
      inverse.set(j, 1 / scale[j]);
    }
  }
}
}
