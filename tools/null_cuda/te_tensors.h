// Numbers of Transformer Engine's tensors: read and written one by one, or as whole matrices with their FP8 scales.

#pragma once

#include <cuda_fp8.h>
#include <transformer_engine/fused_attn.h>
#include <transformer_engine/transformer_engine.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

// TE's headers name no version. TE 2.20 asks other functions of its library than 2.12 and 2.13 do; in these fused_attn.h's
// guard has another name.
#ifdef TRANSFORMER_ENGINE_FUSED_ATTN_H_
#define TE_2_20
#endif

namespace te {

inline void require(bool is_so, const char* otherwise) {
  if (!is_so) throw std::runtime_error(std::string("null_cuda does not compute ") + otherwise);
}

inline NVTEBasicTensor part(NVTETensor tensor, NVTETensorParam which) { return nvte_get_tensor_param(tensor, which); }

// What a caller will find when it asks for the shape of an output or workspace.
inline void describe(NVTETensor tensor, std::initializer_list<size_t> sizes, NVTEDType dtype) {
  NVTEBasicTensor basic = {nullptr, dtype, nvte_make_shape(sizes.begin(), sizes.size())};
  nvte_set_tensor_param(&tensor, kNVTERowwiseData, &basic);
}

inline float* scalar(NVTETensor tensor, NVTETensorParam which) { return static_cast<float*>(part(tensor, which).data_ptr); }

// One number of a PyTorch or NVTE dtype at a time, as fp32.
class Elements {
 public:
  explicit Elements(NVTEBasicTensor tensor) : data_(tensor.data_ptr), dtype_(tensor.dtype) {
    for (size_t i = 0; i < tensor.shape.ndim; ++i) size_ *= tensor.shape.data[i];
    require(data_ || !size_, "on a tensor without data");
  }
  explicit Elements(NVTETensor tensor) : Elements(part(tensor, kNVTERowwiseData)) {}

  size_t size() const { return size_; }
  size_t integer(size_t i) const {
    require(dtype_ == kNVTEInt32, "with these integers");
    return static_cast<int32_t*>(data_)[i];
  }
  float operator[](size_t i) const {
    switch (dtype_) {
      case kNVTEFloat32: return static_cast<float*>(data_)[i];
      case kNVTEBFloat16: return from_bits(uint32_t(static_cast<uint16_t*>(data_)[i]) << 16);
      case kNVTEFloat8E4M3: return float(static_cast<__nv_fp8_e4m3*>(data_)[i]);
      case kNVTEFloat8E5M2: return float(static_cast<__nv_fp8_e5m2*>(data_)[i]);
      case kNVTEFloat8E8M0: return std::ldexp(1.0f, static_cast<uint8_t*>(data_)[i] - 127);
      default: require(false, "with this dtype");
    }
    return 0;
  }
  void set(size_t i, float value) {
    switch (dtype_) {
      case kNVTEFloat32: static_cast<float*>(data_)[i] = value; return;
      case kNVTEBFloat16: static_cast<uint16_t*>(data_)[i] = rounded(value); return;
      case kNVTEFloat8E4M3: static_cast<__nv_fp8_e4m3*>(data_)[i] = __nv_fp8_e4m3(value); return;
      case kNVTEFloat8E5M2: static_cast<__nv_fp8_e5m2*>(data_)[i] = __nv_fp8_e5m2(value); return;
      case kNVTEFloat8E8M0: static_cast<uint8_t*>(data_)[i] = power_above(value) + 127; return;
      default: require(false, "with this dtype");
    }
  }

 private:
  static float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  static uint16_t rounded(float value) {  // to the nearest bf16, ties to even
    if (std::isnan(value)) return 0x7fff;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
  static int power_above(float value) {  // the smallest power of two that is no less (util/ptx.cuh: float_to_e8m0)
    return value > 0 ? std::clamp(int(std::ceil(std::log2(value))), -127, 127) : -127;
  }

  void* data_;
  NVTEDType dtype_;
  size_t size_ = 1;
};

struct Matrix {
  size_t rows, columns;
  std::vector<float> values;
  float& at(size_t i, size_t j) { return values[i * columns + j]; }
  float at(size_t i, size_t j) const { return values[i * columns + j]; }
};

inline Matrix transposed(const Matrix& matrix) {
  Matrix result{matrix.columns, matrix.rows, std::vector<float>(matrix.values.size())};
  for (size_t i = 0; i < matrix.rows; ++i)
    for (size_t j = 0; j < matrix.columns; ++j) result.at(j, i) = matrix.at(i, j);
  return result;
}

inline float largest(const Matrix& matrix) {
  float amax = 0;
  for (float value : matrix.values) amax = std::isnan(value) ? value : std::max(amax, std::abs(value));
  return amax;
}

inline bool is_fp8(NVTEDType dtype) { return dtype == kNVTEFloat8E4M3 || dtype == kNVTEFloat8E5M2; }
inline bool is_fp8(NVTETensor tensor) {
  return is_fp8(part(tensor, kNVTERowwiseData).dtype) || is_fp8(part(tensor, kNVTEColumnwiseData).dtype);
}
inline float fp8_max(NVTEDType dtype) { return dtype == kNVTEFloat8E4M3 ? 448 : 57344; }

struct ScaleRule {
  float epsilon = 0;
  bool power_of_2 = false;
};

// (recipe/recipe_common.cuh: compute_scale_from_amax)
inline float scale_of(float amax, float max_fp8, ScaleRule rule) {
  if (amax < rule.epsilon) amax = rule.epsilon;
  if (!std::isfinite(amax) || amax == 0) return 1;
  float scale = std::min(max_fp8 / amax, std::numeric_limits<float>::max());
  return rule.power_of_2 ? std::exp2(std::floor(std::log2(scale))) : scale;
}

// How FP8 data are stored: column-wise data, for products along the first axis, are the transposed matrix, and so are
// their blocks; but not those of MXFP8, which keeps the matrix and scales down its columns.
struct Storage {
  NVTEScalingMode mode;
  NVTETensorParam which;
  NVTEBasicTensor data, inverse;  // inverse: what to multiply FP8 numbers with

  Storage(NVTETensor tensor, NVTETensorParam which)
      : mode(nvte_tensor_scaling_mode(tensor)), which(which), data(part(tensor, which)),
        inverse(part(tensor, is_columnwise() ? kNVTEColumnwiseScaleInv : kNVTERowwiseScaleInv)) {}

  bool is_columnwise() const { return which == kNVTEColumnwiseData; }
  bool is_transposed() const { return is_columnwise() && mode != NVTE_MXFP8_1D_SCALING; }

  // Where the scale of element (i, j) as stored lies (pytorch/csrc/quantizer.cpp: get_scale_shape).
  size_t scale_index(size_t i, size_t j) const {
    size_t stride = inverse.shape.ndim > 1 ? inverse.shape.data[1] : 0;
    switch (mode) {
      case NVTE_DELAYED_TENSOR_SCALING: return 0;
      case NVTE_BLOCK_SCALING_1D: return j / 128 * stride + i;
      case NVTE_BLOCK_SCALING_2D: return i / 128 * stride + j / 128;
      case NVTE_MXFP8_1D_SCALING: return is_columnwise() ? i / 32 * stride + j : i * stride + j / 32;
      default: require(false, "with this kind of FP8 scales");
    }
    return 0;
  }
};

// The numbers of row-wise or column-wise data as they are stored.
inline Matrix read(NVTETensor tensor, NVTETensorParam which) {
  Storage storage(tensor, which);
  require(storage.data.data_ptr, "with row-wise or column-wise data that are not there");
  Elements elements(storage.data);
  const NVTEShape& shape = storage.data.shape;
  size_t first = shape.ndim ? shape.data[0] : 1, last = shape.ndim ? shape.data[shape.ndim - 1] : 1;
  size_t rows = storage.is_transposed() ? first : elements.size() / std::max<size_t>(last, 1);
  Matrix matrix{rows, rows ? elements.size() / rows : 0, std::vector<float>(elements.size())};
  for (size_t i = 0; i < matrix.rows; ++i)
    for (size_t j = 0; j < matrix.columns; ++j) {
      float inverse = is_fp8(storage.data.dtype) ? Elements(storage.inverse)[storage.scale_index(i, j)] : 1;
      matrix.at(i, j) = elements[i * matrix.columns + j] * inverse;
    }
  return matrix;
}

// What to multiply numbers with before they become FP8. The scales of blocks come from the largest number in each.
inline std::vector<float> scales_for(const Storage& storage, NVTETensor tensor, const Matrix& stored, ScaleRule rule) {
  if (!is_fp8(storage.data.dtype)) return {};
  Elements inverse(storage.inverse);
  if (storage.mode == NVTE_DELAYED_TENSOR_SCALING) {
    float scale = *scalar(tensor, kNVTEScale);
    inverse.set(0, 1 / scale);
    return {scale};
  }
  std::vector<float> scales(inverse.size());
  for (size_t i = 0; i < stored.rows; ++i)
    for (size_t j = 0; j < stored.columns; ++j) {
      float& amax = scales[storage.scale_index(i, j)];
      amax = std::max(amax, std::abs(stored.at(i, j)));
    }
  float most = fp8_max(storage.data.dtype);
  for (size_t i = 0; i < scales.size(); ++i) {
    if (storage.mode == NVTE_MXFP8_1D_SCALING) {
      inverse.set(i, scales[i] / most);
      scales[i] = 1 / inverse[i];
    } else {
      scales[i] = scale_of(scales[i], most, rule);
      inverse.set(i, 1 / scales[i]);
    }
  }
  return scales;
}

// Store a matrix in every form that the tensor has; FP8 per tensor with the scale that it holds.
inline void write(NVTETensor tensor, const Matrix& matrix, ScaleRule rule) {
  for (NVTETensorParam which : {kNVTERowwiseData, kNVTEColumnwiseData}) {
    Storage storage(tensor, which);
    if (!storage.data.data_ptr) continue;
    const Matrix stored = storage.is_transposed() ? transposed(matrix) : matrix;
    std::vector<float> scales = scales_for(storage, tensor, stored, rule);
    Elements elements(storage.data);
    require(elements.size() == stored.values.size(), "into a tensor of another size");
    for (size_t i = 0; i < stored.rows; ++i)
      for (size_t j = 0; j < stored.columns; ++j)
        elements.set(i * stored.columns + j,
                     stored.at(i, j) * (scales.empty() ? 1 : scales[storage.scale_index(i, j)]));
  }
  // Delayed scaling takes the scale of later steps from the largest number of this one.
  float* amax = scalar(tensor, kNVTEAmax);
  if (nvte_tensor_scaling_mode(tensor) == NVTE_DELAYED_TENSOR_SCALING && is_fp8(tensor) && amax)
    *amax = std::max(*amax, largest(matrix));
}

}  // namespace te
