// Transformer Engine's fused attention without cuDNN, which builds its graphs by asking the device for more than
// a null CUDA can answer. Preloaded beside libcudart.cpp, these take the place of libtransformer_engine.so's
// functions of the same name: they tell the caller how large outputs and workspaces are and compute nothing.
//
// Sizes are those of TE's fused_attn_f16_arbitrary_seqlen.cu and of cuDNN frontend's SDPA backward node.

#include <transformer_engine/fused_attn.h>

#include <initializer_list>

namespace {

struct Heads {
  size_t tokens, heads, head_dim;
};

// [..., heads, head_dim]: packed documents are [tokens, heads, head_dim].
Heads heads_of(const NVTETensor tensor) {
  NVTEShape shape = nvte_tensor_shape(tensor);
  size_t tokens = 1;
  for (size_t i = 0; i + 2 < shape.ndim; ++i) tokens *= shape.data[i];
  return {tokens, shape.data[shape.ndim - 2], shape.data[shape.ndim - 1]};
}

// Packed tokens for which cuDNN builds a graph: a power of two, from 32K on a multiple of 32K (fused_attn/utils.cu).
size_t graph_tokens(size_t tokens) {
  constexpr size_t kStep = 32768;
  if (tokens > kStep) return (tokens + kStep - 1) / kStep * kStep;
  size_t rounded = 1024;
  while (rounded < tokens) rounded *= 2;
  return rounded;
}

void describe(NVTETensor tensor, std::initializer_list<size_t> sizes, NVTEDType dtype) {
  NVTEBasicTensor basic = {nullptr, dtype, nvte_make_shape(sizes.begin(), sizes.size())};
  nvte_set_tensor_param(&tensor, kNVTERowwiseData, &basic);
}

// TE calls twice: for the sizes, then with memory of that size to run the kernel.
bool has_memory(const NVTETensor workspace) { return nvte_tensor_data(workspace) != nullptr; }

}  // namespace

extern "C" {

void nvte_fused_attn_fwd(const NVTETensor Q, const NVTETensor K, const NVTETensor, const NVTETensor, const NVTETensor,
                         NVTETensor, NVTETensor, NVTETensorPack* saved, const NVTETensor,
                         const NVTETensor, const NVTETensor, const NVTETensor, const NVTETensor, const NVTETensor,
                         const NVTETensor, size_t max_seqlen_q, size_t, bool, bool, bool, float, float,
                         NVTE_QKV_Layout layout, NVTE_Bias_Type, NVTE_Mask_Type, NVTE_Softmax_Type, int64_t, int64_t,
                         NVTETensor workspace, cudaStream_t) {
  if (has_memory(workspace)) return;
  Heads q = heads_of(Q);
  if (nvte_get_qkv_format(layout) == NVTE_THD)
    describe(saved->tensors[0], {graph_tokens(q.tokens), q.heads, 1}, kNVTEFloat32);
  else
    describe(saved->tensors[0], {q.tokens / max_seqlen_q, q.heads, max_seqlen_q, 1}, kNVTEFloat32);
  describe(saved->tensors[1], {2}, kNVTEInt64);  // state of the random generator
  saved->size = 2;
  describe(workspace, {1024}, kNVTEByte);
}

void nvte_fused_attn_bwd(const NVTETensor Q, const NVTETensor K, const NVTETensor, const NVTETensor, const NVTETensor,
                         const NVTETensor, NVTETensor, const NVTETensorPack*, NVTETensor, NVTETensor, NVTETensor,
                         NVTETensor, NVTETensor, const NVTETensor, const NVTETensor, const NVTETensor,
                         const NVTETensor, size_t, size_t, float, float, NVTE_QKV_Layout layout, NVTE_Bias_Type,
                         NVTE_Mask_Type, NVTE_Softmax_Type, int64_t, int64_t, bool, bool, NVTETensor workspace,
                         cudaStream_t) {
  if (has_memory(workspace)) return;
  Heads q = heads_of(Q), k = heads_of(K);
  bool packed = nvte_get_qkv_format(layout) == NVTE_THD;
  size_t queries = (packed ? graph_tokens(q.tokens) : q.tokens) * q.heads;
  size_t keys = (packed ? graph_tokens(k.tokens) : k.tokens) * q.heads;
  size_t bytes = queries * (q.head_dim + 1) * 4;              // fp32 gradients of the queries, and sum(o·do)
  if (k.heads < q.heads) bytes += 2 * keys * k.head_dim * 4;  // those of keys and values, once per query head
  describe(workspace, {bytes}, kNVTEByte);
}
}
