"""The weight gradient of the chunked loss on a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_prolong.model import cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_a_chunk_is_added_unrounded() -> None:
    """Sums of about 30. 1e-3: in fp32, however a GPU adds 64 products; rounded to bf16 they would be 0.1 off."""
    torch.manual_seed(0)
    dlogits, hidden = (torch.randn(64, size, device="cuda", dtype=torch.bfloat16) for size in (512, 256))
    total = torch.randn(512, 256, device="cuda")
    exact = total.double() + dlogits.double().T @ hidden.double()
    cross_entropy._add_product(total, dlogits.T, hidden)
    torch.testing.assert_close(total.double(), exact, rtol=0, atol=1e-3)
