"""Log-probabilities and greedy generation of a checkpoint in place against transformers, token by token."""

import pytest
import torch
from reference import reference_llama

from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.mcore import inference
from megatron_prolong.mcore.groups import megatron
from megatron_prolong.mcore.inference import load_for_inference
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.runtime.launch import distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inference")
    hf = reference_llama()
    hf.save_pretrained(directory / "hf")
    to_megatron(directory / "hf", directory / "ours")
    with distributed() as world, megatron(Layout(), seed=1) as groups:
        yield hf, load_for_inference(directory / "ours", Layout(), groups, world.device, "fp32")


def test_token_logprobs_in_chunks(models, monkeypatch):
    hf, ours = models
    monkeypatch.setattr(inference, "PREFILL_TOKENS", 50)  # several chunks, the last one not full
    ids = torch.randint(0, 1000, (230,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logprobs = hf(ids[None]).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(ours.token_logprobs([ids.tolist()])[0], expected, rtol=1e-4, atol=1e-3)


def test_greedy_generation_of_prompts_of_different_lengths(models):
    hf, ours = models
    random = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 1000, (length,), generator=random).tolist() for length in (3, 40, 17)]
    expected = []
    for prompt in prompts:
        output = hf.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected.append(output[0, len(prompt) :].tolist())
    assert ours.generate(prompts, 12) == expected
    stop = expected[0][4]
    answers = ours.generate(prompts, 12, lambda output: output[-1] == stop)
    assert answers[0] == expected[0][: expected[0].index(stop) + 1]


def test_it_has_no_buffers_for_gradients(models):
    _, ours = models
    assert ours.model.chunks == ours.model.bare_chunks


def test_no_token_is_read_in_vain(models, monkeypatch):
    """The last token of an answer is not fed to the model again."""
    _, ours = models
    passes = []
    forward = inference.InferenceModel._forward
    monkeypatch.setattr(
        inference.InferenceModel,
        "_forward",
        lambda *given, **named: passes.append(1) or forward(*given, **named),
    )
    (answer,) = ours.generate([[1, 2, 3]], 6)
    assert len(answer) == 6 and len(passes) == 1 + 6, "the prompt but for its last token in one pass"
    first = answer.index(answer[3])
    passes.clear()
    ended = ours.generate([[1, 2, 3]], 6, lambda output: output[-1] == answer[3])
    assert ended == [answer[: first + 1]]
    assert len(passes) == 1 + first + 1
