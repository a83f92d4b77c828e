"""The model on one GPU against transformers on CPU in fp32: bf16 natively and on Transformer Engine, and FP8.

Bounds: bf16 keeps 8 bits, so the loss is within 1e-2 of fp32's and each weight's gradient points the same way
(cosine above 0.999); FP8 products keep 3 bits of mantissa: loss within 3e-2, cosine above 0.97. Over 100 steps
FP8's errors average out: loss within 1% of bf16's.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

LENGTHS = (96, 1, 160, 64, 32, 159)  # 512 tokens: FP8 products work on tiles
BOUNDS = {"bf16": (1e-2, 0.999), "fp8": (3e-2, 0.97)}


@pytest.fixture(scope="module")
def world():
    from megatron_prolong.runtime.launch import distributed

    with distributed() as world:
        yield world


@pytest.fixture(params=["native", "transformer_engine"])
def kernels(request, monkeypatch):
    """Which layers are built."""
    from megatron_prolong.mcore import config, specs

    if request.param == "transformer_engine":
        pytest.importorskip("transformer_engine")
    else:
        for module in (specs, config):
            monkeypatch.setattr(module, "runs_on_transformer_engine", lambda dtype: False)
    return request.param


def model_like(hf, precision: str):
    """Our model with the reference's weights, built for training; its weights by their native names."""
    from reference import megatron_weights, shape_of

    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.recipe.schema import Layout

    model = build_model(shape_of(hf), Layout(), precision=precision, loss_chunk_tokens=100)
    weights = native_names(dict(model.bare_chunks[0].named_parameters()))
    with torch.no_grad():
        for name, value in megatron_weights(hf).items():
            weights[name].zero_()
            weights[name][: len(value)].copy_(value)
    return model, weights


def loss_and_gradients(hf, batch, world, precision: str):
    """Of our model, on the GPU: mean loss and the fp32 gradient of every weight."""
    from test_transformers import to_micro_batch

    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.schedule import forward_backward
    from megatron_prolong.recipe.schema import Layout

    with megatron(Layout(), seed=1) as groups:
        model, weights = model_like(hf, precision)
        loss, *_ = forward_backward(model, [to_micro_batch(batch, groups, world)], groups)
        return loss, {name: weight.main_grad.float().cpu() for name, weight in weights.items()}


def losses_of_training(hf, world, precision: str, num_steps: int) -> list[float]:
    """Of AdamW steps over eight batches, again and again."""
    from test_transformers import random_batch, to_micro_batch

    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.optimizer import build_optimizer
    from megatron_prolong.recipe.schema import Layout, OptimizerSpec
    from megatron_prolong.training.step import train_step

    spec = OptimizerSpec()
    with megatron(Layout(), seed=1) as groups:
        model, _ = model_like(hf, precision)
        optimizer = build_optimizer(model, spec, Layout(), lr=1e-4)
        batches = [to_micro_batch(random_batch(seed, lengths=LENGTHS), groups, world) for seed in range(8)]
        return [
            train_step(model, optimizer, [batches[step % 8]], groups, spec=spec, lr=1e-4).loss
            for step in range(num_steps)
        ]


@pytest.mark.parametrize("precision", BOUNDS)
def test_loss_and_gradients_against_transformers(kernels, precision, world):
    from reference import megatron_weights, reference_llama
    from test_transformers import random_batch, reference_loss

    if precision == "fp8" and (kernels == "native" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("FP8 needs Transformer Engine and compute capability 8.9")
    hf = reference_llama()
    batch = random_batch(7, lengths=LENGTHS)
    expected = reference_loss(hf, [batch])
    expected.backward()
    loss, gradients = loss_and_gradients(hf, batch, world, precision)
    loss_bound, cosine_bound = BOUNDS[precision]
    assert loss == pytest.approx(expected.item(), rel=loss_bound)
    for name, reference in megatron_weights(hf, gradients=True).items():
        ours = gradients[name][: reference.shape[0]].flatten()
        cosine = torch.nn.functional.cosine_similarity(ours, reference.flatten(), dim=0)
        assert cosine > cosine_bound, f"{name}: cosine {cosine:.4f}"


def test_inference_against_transformers(kernels, world, tmp_path, monkeypatch):
    """Log-probabilities read in chunks; and greedy tokens of a batch: the reference's best, or as good in bf16."""
    from reference import reference_llama

    from megatron_prolong.convert.to_megatron import to_megatron
    from megatron_prolong.mcore import inference
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.recipe.schema import Layout

    monkeypatch.setattr(inference, "PREFILL_TOKENS", 50)
    hf = reference_llama()
    hf.save_pretrained(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "ours")
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 1000, (length,), generator=random).tolist() for length in (230, 3, 40)]
    with megatron(Layout(), seed=1) as groups, torch.no_grad():
        ours = inference.load_for_inference(tmp_path / "ours", Layout(), groups, world.device, "bf16")
        (logprobs,) = ours.token_logprobs(prompts[:1])
        answers = ours.generate(prompts, 12)
        expected = hf(torch.tensor(prompts[:1])).logits[0].log_softmax(-1)
        expected = expected[:-1].gather(1, torch.tensor(prompts[0][1:])[:, None])[:, 0]
        assert (logprobs - expected).abs().mean() < 2e-2 * expected.std()
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = hf(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert len(answer) == 12 and (logits.amax(1) - chosen < 5e-2 * logits.std()).all()


def test_fp8_trains_like_bf16(world):
    """The mean loss of the last eight of 100 steps is within 1%, and well below that of the first eight."""
    from reference import reference_llama

    pytest.importorskip("transformer_engine")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    bf16, fp8 = (
        losses_of_training(reference_llama(), world, precision, 100) for precision in ("bf16", "fp8")
    )
    assert sum(bf16[-8:]) < 0.9 * sum(bf16[:8])
    assert sum(fp8[-8:]) == pytest.approx(sum(bf16[-8:]), rel=1e-2)


def test_a_deterministic_training_is_repeated_bit_for_bit(kernels, world):
    from reference import reference_llama

    from megatron_prolong.runtime.determinism import deterministic_kernels

    with deterministic_kernels(True):
        first, again = (losses_of_training(reference_llama(), world, "bf16", 5) for _ in range(2))
    assert first == again


def native_names(weights):
    """Transformer Engine keeps each norm in the linear behind it; name them as the native layers do."""
    renamed = {}
    for name, weight in weights.items():
        name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        renamed[name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")] = weight
    return renamed


def document_by_document(q_TND, k_TGD, v_TGD, cu_seqlens):
    """The dull twin: each document by itself through PyTorch's attention."""
    outs = []
    for start, stop in pairwise(cu_seqlens):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (q_TND, k_TGD, v_TGD))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def test_attention_kernel_against_dense_attention():
    """Forward and backward of packed documents, bf16 on the GPU against fp32 dense attention on CPU."""
    from megatron_prolong.model.attention import packed_attention

    torch.manual_seed(0)
    cu_seqlens = [0, 100, 101, 357, 512]
    q, k, v, dout = (torch.randn(512, heads, 64).bfloat16() for heads in (8, 2, 2, 8))
    expected, ours = [], []
    for device, dtype, results in (("cpu", torch.float32, expected), ("cuda", torch.bfloat16, ours)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        run = document_by_document if device == "cpu" else packed_attention
        out = run(*inputs, cu_seqlens)
        results += [out, *torch.autograd.grad(out, inputs, dout.to(device, dtype))]
    # The kernel rounds probabilities to bf16; emulated on CPU, gradients of values come to 0.8 of this.
    for actual, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual.float().cpu(), reference, rtol=2e-2, atol=4e-2)
