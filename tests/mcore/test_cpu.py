"""The compatibility layer does what its table says, leaves nothing behind, and refuses a machine with CUDA."""

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_prolong.mcore.adam import FusedAdam, fused_adam_in_megatron
from megatron_prolong.mcore.cpu import cuda_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_cuda_calls_are_answered_by_the_cpu_and_only_inside():
    with cuda_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.ones(2).cuda().device.type == "cpu"
        assert torch.ones(2).to("cuda:0").device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.ones(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_the_random_state_of_the_gpu_is_that_of_the_cpu():
    with cuda_on_cpu():
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(3))


def test_it_must_not_be_entered_where_cuda_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AssertionError, match="must not be entered"), cuda_on_cpu():
        pass


def test_fused_adam_equals_torch_adamw_and_keeps_its_step_in_the_group():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    adam = FusedAdam([ours], adam_w_mode=True, **options)
    reference = torch.optim.AdamW([theirs], **options)
    for _ in range(10):
        gradient = torch.randn(64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # another order of the same operations
    assert adam.param_groups[0]["step"] == 10
    assert set(adam.state[ours]) == {"exp_avg", "exp_avg_sq"}


def test_a_rank_that_has_no_part_of_a_group_counts_its_steps_all_the_same():
    """All norms may lie on other ranks; any rank's count may be the one that is saved."""
    moved, without_gradient = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "adam_w_mode": True}
    adam = FusedAdam([{"params": params} for params in ([moved], [without_gradient], [])], **options)
    moved.grad = torch.ones(2)
    for _ in range(2):
        adam.step()
    assert [group["step"] for group in adam.param_groups] == [2, 2, 2]
    assert moved.max() < 1 and torch.equal(without_gradient, torch.ones(2))


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_megatron_takes_another_adam_only_where_there_is_one_for_the_gpu(fused, cuda, monkeypatch):
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", fused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with fused_adam_in_megatron():
        taken = {megatron_optimizer.Adam, distrib_optimizer.Adam}
    assert (taken == {FusedAdam}) == (not (fused and cuda))
