"""What is parked in host memory comes back in the order of the backward, a little ahead of it."""

import numpy as np
import torch

from megatron_prolong.mcore import offload
from megatron_prolong.mcore.offload import HostOffload
from megatron_prolong.model.attention import packed_attention


def test_the_backward_finds_what_it_needs_next_on_its_way(monkeypatch):
    monkeypatch.setattr(offload, "AHEAD_BYTES", 100)
    park = HostOffload([], min_bytes=1)
    values = [torch.full((25,), float(index)) for index in range(4)]  # 100 bytes each
    saved = [park._park(value) for value in values]
    parked = [one for one, _ in saved]
    assert all(one.back is None for one in parked)
    for index in (3, 2, 1, 0):
        assert torch.equal(park._fetch(saved[index]), values[index])
        assert [one.back is not None for one in parked] == [one == index - 1 for one in range(4)]
    assert torch.equal(park._fetch(saved[2]), values[2])  # a graph that is kept may ask again


def test_what_several_nodes_save_travels_once_and_stays_until_the_last_has_it():
    park, value = HostOffload([], min_bytes=1), torch.randn(6, 4)
    first, second, other = (park._park(one) for one in (value, value.view(24), value.T))
    assert first[0] is second[0] is not other[0], "a transposed one has its numbers in another order"
    assert park.num_parked_bytes == 2 * value.nbytes
    for saved, expected, stays in (
        (second, value.view(24), True),
        (first, value, False),
        (other, value.T, False),
    ):
        assert torch.equal(park._fetch(saved), expected)
        assert (saved[0].back is not None) == stays


def test_other_numbers_in_the_same_memory_are_another_tensor():
    """Where a tensor was that is gone, or has been written to since."""
    park, memory, saved = HostOffload([], min_bytes=1), np.zeros(8, np.float32), []
    for number in (1.0, 2.0):
        memory[:] = number
        value = torch.from_numpy(memory)
        saved.append(park._park(value))
    value += 1
    saved.append(park._park(value))
    assert [park._fetch(one)[0].item() for one in saved] == [1.0, 2.0, 3.0]


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
        out = packed_attention(*qkv, [0, 7, 24])
    brought = []
    monkeypatch.setattr(park, "_copy", lambda source, target: brought.append(target.copy_(source).nbytes))
    out.sum().backward()
    assert sum(brought) == park.num_parked_bytes > 0
