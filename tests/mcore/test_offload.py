"""What is parked in host memory comes back in the order of the backward, a little ahead of it."""

import torch

from megatron_prolong.mcore import offload
from megatron_prolong.mcore.offload import HostOffload, Parked
from megatron_prolong.model.attention import packed_attention


def test_the_backward_finds_what_it_needs_next_on_its_way(monkeypatch):
    monkeypatch.setattr(offload, "AHEAD_BYTES", 100)
    park = HostOffload([], min_bytes=1)
    values = [torch.full((25,), float(index)) for index in range(4)]  # 100 bytes each
    parked = [park._park(value) for value in values]
    assert all(isinstance(one, Parked) and one.back is None for one in parked)
    for index in (3, 2, 1, 0):
        assert torch.equal(park._fetch(parked[index]), values[index])
        assert [one.back is not None for one in parked] == [one == index - 1 for one in range(4)]
    assert torch.equal(park._fetch(parked[2]), values[2])  # a graph that is kept may ask again


def test_passes_are_apart_and_weights_and_small_tensors_stay():
    layer = torch.nn.Linear(8, 8, bias=False)
    park = HostOffload([layer], min_bytes=200)
    inputs = [torch.randn(8, 8, requires_grad=True) for _ in range(2)]
    outputs = []
    for value in inputs:
        with park:
            outputs.append((layer(value) ** 2).sum())
        assert park._last is None
    assert (
        park.num_parked_bytes == 2 * (8 * 8 * 4) * 2
    )  # the input of the layer and of the square, not the weight
    for value, output in zip(inputs, outputs, strict=True):
        output.backward()
        expected = torch.autograd.grad((layer(value) ** 2).sum(), value)[0]
        torch.testing.assert_close(value.grad, expected)


def test_what_a_node_has_asked_for_is_not_brought_again(monkeypatch):
    """A node asks for what it saved in the order it saved it: the ones before the last have come, and a second copy
    that nobody waits for would be written into memory that has another use by then."""
    park = HostOffload([], min_bytes=1)
    qkv = [torch.randn(24, 4, 8, requires_grad=True) for _ in range(3)]
    with park:
        out = packed_attention(*qkv, torch.tensor([0, 7, 24]))
    brought = []
    monkeypatch.setattr(park, "_copy", lambda source, target: brought.append(target.copy_(source).nbytes))
    out.sum().backward()
    assert sum(brought) == park.num_parked_bytes > 0
