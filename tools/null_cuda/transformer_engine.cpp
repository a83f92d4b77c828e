// Transformer Engine's fused attention without cuDNN, which builds its graphs by asking the device for more than
// a null CUDA can answer. Preloaded beside libcudart.cpp, these take the place of libtransformer_engine.so's
// functions of the same name: they tell the caller how large outputs and workspaces are, and under `run.py --compute`
// attend packed documents on the CPU.
//
// Sizes are those of TE 2.12's fused_attn_f16_arbitrary_seqlen.cu and of cuDNN frontend's SDPA backward node.

#include "te_tensors.h"

#include <transformer_engine/fused_attn.h>
#include <transformer_engine/normalization.h>

#include <cstdlib>

using namespace te;

namespace {

const bool kComputes = std::getenv("NULL_CUDA_MESSAGES");

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

// TE calls twice: for the sizes, then with memory of that size to run the kernel.
bool has_memory(const NVTETensor workspace) { return nvte_tensor_data(workspace) != nullptr; }

// Documents of queries and keys: where they begin in memory, how long they are, and which keys a query sees.
class Documents {
 public:
  Documents(NVTETensor lengths_q, NVTETensor lengths_k, NVTETensor starts_q, NVTETensor starts_k, size_t longest_q,
            size_t longest_k, NVTE_QKV_Layout layout, NVTE_Mask_Type mask)
      : q_(lengths_q), k_(lengths_k), start_q_(given(starts_q, lengths_q)), start_k_(given(starts_k, lengths_k)) {
    require(layout == NVTE_THD_THD_THD, "attention of another layout than packed documents");
    causal_ = mask != NVTE_NO_MASK && mask != NVTE_PADDING_MASK;
    at_the_end_ = mask == NVTE_CAUSAL_BOTTOM_RIGHT_MASK || mask == NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK;
    for (size_t i = 0; i + 1 < q_.size(); ++i)
      require(length(q_, i) <= longest_q && length(k_, i) <= longest_k, "documents beyond the longest");
  }

  // Calls f(query, first key, keys that it sees) for every query of every document.
  template <class F>
  void each_query(F f) const {
    for (size_t i = 0; i + 1 < q_.size(); ++i) {
      size_t queries = length(q_, i), keys = length(k_, i);
      for (size_t j = 0; j < queries; ++j) {
        size_t seen = at_the_end_ ? std::max<int64_t>(int64_t(j + 1 + keys) - int64_t(queries), 0) : j + 1;
        f(start_q_.integer(i) + j, start_k_.integer(i), causal_ ? std::min(seen, keys) : keys);
      }
    }
  }

 private:
  static Elements given(NVTETensor starts, NVTETensor lengths) {
    return Elements(starts && nvte_tensor_data(starts) ? starts : lengths);
  }
  static size_t length(const Elements& bounds, size_t i) { return bounds.integer(i + 1) - bounds.integer(i); }

  Elements q_, k_, start_q_, start_k_;
  bool causal_, at_the_end_;
};

// Numbers of [tokens, heads, head_dim] in fp32.
struct Rows {
  Heads shape;
  std::vector<float> values;
  explicit Rows(NVTETensor tensor) : shape(heads_of(tensor)), values(read(tensor, kNVTERowwiseData).values) {}
  float* at(size_t token, size_t head) { return &values[(token * shape.heads + head) * shape.head_dim]; }
  void zero() { std::fill(values.begin(), values.end(), 0.0f); }
  void store(NVTETensor tensor) const {
    Elements elements(tensor);
    for (size_t i = 0; i < values.size(); ++i) elements.set(i, values[i]);
  }
};

float dot(const float* a, const float* b, size_t size) {
  float sum = 0;
  for (size_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

void add(float* to, const float* from, float factor, size_t size) {
  for (size_t i = 0; i < size; ++i) to[i] += factor * from[i];
}

void attend(NVTETensor Q, NVTETensor K, NVTETensor V, NVTETensor O, NVTETensor lse, const Documents& documents,
            float scale) {
  Rows q(Q), k(K), v(V), out(O);
  Elements stats(lse);
  std::vector<float> scores;
  for (size_t head = 0; head < q.shape.heads; ++head)
    documents.each_query([&](size_t query, size_t first, size_t seen) {
      size_t kv_head = head / (q.shape.heads / k.shape.heads);
      float most = -INFINITY, sum = 0, *row = out.at(query, head);
      scores.resize(seen);
      for (size_t i = 0; i < seen; ++i)
        most = std::max(most, scores[i] = scale * dot(q.at(query, head), k.at(first + i, kv_head), q.shape.head_dim));
      for (size_t i = 0; i < seen; ++i) sum += scores[i] = std::exp(scores[i] - most);
      std::fill(row, row + out.shape.head_dim, 0.0f);
      for (size_t i = 0; i < seen; ++i) add(row, v.at(first + i, kv_head), scores[i] / sum, out.shape.head_dim);
      stats.set(query * q.shape.heads + head, most + std::log(sum));
    });
  out.store(O);
}

void attend_backward(NVTETensor Q, NVTETensor K, NVTETensor V, NVTETensor O, NVTETensor dO, NVTETensor lse,
                     NVTETensor dQ, NVTETensor dK, NVTETensor dV, const Documents& documents, float scale) {
  Rows q(Q), k(K), v(V), out(O), dout(dO), dq(dQ), dk(dK), dv(dV);
  for (Rows* rows : {&dq, &dk, &dv}) rows->zero();
  Elements stats(lse);
  size_t size = q.shape.head_dim;
  for (size_t head = 0; head < q.shape.heads; ++head)
    documents.each_query([&](size_t query, size_t first, size_t seen) {
      size_t kv_head = head / (q.shape.heads / k.shape.heads);
      float delta = dot(dout.at(query, head), out.at(query, head), size);
      for (size_t i = first; i < first + seen; ++i) {
        float score = scale * dot(q.at(query, head), k.at(i, kv_head), size);
        float probability = std::exp(score - stats[query * q.shape.heads + head]);
        float dscore = scale * probability * (dot(dout.at(query, head), v.at(i, kv_head), size) - delta);
        add(dv.at(i, kv_head), dout.at(query, head), probability, size);
        add(dk.at(i, kv_head), q.at(query, head), dscore, size);
        add(dq.at(query, head), k.at(i, kv_head), dscore, size);
      }
    });
  dq.store(dQ), dk.store(dK), dv.store(dV);
}

// What a call brings beside the tensors of its direction.
struct Call {
  NVTETensorPack* saved;
  NVTETensor lengths_q, lengths_k, starts_q, starts_k;
  size_t max_seqlen_q, max_seqlen_k;
  float scale;
  NVTE_QKV_Layout layout;
  NVTE_Mask_Type mask;
  NVTETensor workspace;

  bool is_packed() const { return nvte_get_q_format(layout) == NVTE_THD; }
  Documents documents() const {
    return {lengths_q, lengths_k, starts_q, starts_k, max_seqlen_q, max_seqlen_k, layout, mask};
  }
};

void forward(NVTETensor Q, NVTETensor K, NVTETensor V, NVTETensor O, const Call& call) {
  NVTETensor* saved = call.saved->tensors;
  if (has_memory(call.workspace)) {
    if (kComputes) attend(Q, K, V, O, saved[0], call.documents(), call.scale);
    return;
  }
  Heads q = heads_of(Q);
  if (call.is_packed())
    describe(saved[0], {q.tokens, q.heads, 1}, kNVTEFloat32);
  else
    describe(saved[0], {q.tokens / call.max_seqlen_q, q.heads, call.max_seqlen_q, 1}, kNVTEFloat32);
  describe(saved[1], {2}, kNVTEInt64);  // state of the random generator
  call.saved->size = 2;
  describe(call.workspace, {1024}, kNVTEByte);
}

void backward(NVTETensor Q, NVTETensor K, NVTETensor V, NVTETensor O, NVTETensor dO, NVTETensor dQ, NVTETensor dK,
              NVTETensor dV, const Call& call) {
  if (has_memory(call.workspace)) {
    if (kComputes)
      attend_backward(Q, K, V, O, dO, call.saved->tensors[0], dQ, dK, dV, call.documents(), call.scale);
    return;
  }
  Heads q = heads_of(Q), k = heads_of(K);
  size_t queries = (call.is_packed() ? graph_tokens(q.tokens) : q.tokens) * q.heads;
  size_t keys = (call.is_packed() ? graph_tokens(k.tokens) : k.tokens) * q.heads;
  size_t bytes = queries * (q.head_dim + 1) * 4;              // fp32 gradients of the queries, and sum(o·do)
  if (k.heads < q.heads) bytes += 2 * keys * k.head_dim * 4;  // those of keys and values, once per query head
  describe(call.workspace, {bytes}, kNVTEByte);
}

// An attribute of TE's objects of arguments.
template <class T, class Get, class Attribute>
T of(void* params, Get get, Attribute which) {
  T value;
  size_t written;
  get(params, which, &value, sizeof value, &written);
  return value;
}

}  // namespace

extern "C" {

#ifdef TE_2_20  // all arguments in one object

#define FORWARD(type, name) of<type>(params, nvte_get_fused_attn_fwd_params_attribute, kNVTEFusedAttnFwdParams##name)
#define BACKWARD(type, name) of<type>(params, nvte_get_fused_attn_bwd_params_attribute, kNVTEFusedAttnBwdParams##name)
#define CALL(get)                                                                                            \
  {get(NVTETensorPack*, AuxCtxTensors), get(NVTETensor, CuSeqlensQ), get(NVTETensor, CuSeqlensKV),           \
   get(NVTETensor, CuSeqlensQPadded), get(NVTETensor, CuSeqlensKVPadded), get(size_t, MaxSeqlenQ),           \
   get(size_t, MaxSeqlenKV), get(float, AttnScale), get(NVTE_QKV_Layout, QKVLayout),                         \
   get(NVTE_Mask_Type, AttnMaskType), get(NVTETensor, Workspace)}

// TE compiles its norms for the device that it finds. Their workspace, a few MB on a GPU, is left out.
void nvte_rmsnorm_fwd(const NVTETensor, const NVTETensor, const float, NVTETensor, NVTETensor, NVTETensor workspace,
                      const int, const bool, cudaStream_t) {
  if (!has_memory(workspace)) describe(workspace, {1024}, kNVTEByte);
}

void nvte_rmsnorm_bwd(const NVTETensor, const NVTETensor, const NVTETensor, const NVTETensor, NVTETensor, NVTETensor,
                      NVTETensor workspace, const int, const bool, cudaStream_t) {
  if (!has_memory(workspace)) describe(workspace, {1024}, kNVTEByte);
}

// TE has cuDNN build the graph and so learns whether there is one.
NVTE_Fused_Attn_Backend nvte_get_fused_attn_backend_v2(NVTEFusedAttnConfig config, const char** message) {
  auto dtype = of<NVTEDType>(config, nvte_get_fused_attn_config_attribute, kNVTEFusedAttnConfigQKVDtype);
  bool is_known = dtype == kNVTEBFloat16;
  if (message) *message = is_known ? "" : "null_cuda attends in bf16 only";
  return is_known ? NVTE_F16_arbitrary_seqlen : NVTE_No_Backend;
}

void nvte_fused_attn_fwd_v2(NVTEFusedAttnFwdParams params) {
  forward(FORWARD(NVTETensor, Q), FORWARD(NVTETensor, K), FORWARD(NVTETensor, V), FORWARD(NVTETensor, O),
          CALL(FORWARD));
}

void nvte_fused_attn_bwd_v2(NVTEFusedAttnBwdParams params) {
  backward(BACKWARD(NVTETensor, Q), BACKWARD(NVTETensor, K), BACKWARD(NVTETensor, V), BACKWARD(NVTETensor, O),
           BACKWARD(NVTETensor, DO), BACKWARD(NVTETensor, DQ), BACKWARD(NVTETensor, DK), BACKWARD(NVTETensor, DV),
           CALL(BACKWARD));
}

#else

void nvte_fused_attn_fwd(const NVTETensor Q, const NVTETensor K, const NVTETensor V, const NVTETensor, const NVTETensor,
                         NVTETensor, NVTETensor O, NVTETensorPack* saved, const NVTETensor lengths_q,
                         const NVTETensor lengths_k, const NVTETensor starts_q, const NVTETensor starts_k,
                         const NVTETensor, const NVTETensor, const NVTETensor, size_t max_seqlen_q,
                         size_t max_seqlen_k, bool, bool, bool, float scale, float, NVTE_QKV_Layout layout,
                         NVTE_Bias_Type, NVTE_Mask_Type mask, NVTE_Softmax_Type, int64_t, int64_t, bool,
                         NVTETensor workspace, cudaStream_t) {
  forward(Q, K, V, O, {saved, lengths_q, lengths_k, starts_q, starts_k, max_seqlen_q, max_seqlen_k, scale, layout,
                       mask, workspace});
}

void nvte_fused_attn_bwd(const NVTETensor Q, const NVTETensor K, const NVTETensor V, const NVTETensor O,
                         const NVTETensor dO, const NVTETensor, NVTETensor, const NVTETensorPack* saved, NVTETensor dQ,
                         NVTETensor dK, NVTETensor dV, NVTETensor, NVTETensor, const NVTETensor lengths_q,
                         const NVTETensor lengths_k, const NVTETensor starts_q, const NVTETensor starts_k,
                         size_t max_seqlen_q, size_t max_seqlen_k, float scale, float, NVTE_QKV_Layout layout,
                         NVTE_Bias_Type, NVTE_Mask_Type mask, NVTE_Softmax_Type, int64_t, int64_t, bool, bool, bool,
                         NVTETensor workspace, cudaStream_t) {
  backward(Q, K, V, O, dO, dQ, dK, dV,
           {const_cast<NVTETensorPack*>(saved), lengths_q, lengths_k, starts_q, starts_k, max_seqlen_q, max_seqlen_k,
            scale, layout, mask, workspace});
}

#endif
}
