"""The one seam to Megatron-Core and Transformer Engine: nothing outside this package imports either."""

import logging
import warnings

# PyTorch's compiler of extensions, which Megatron imports, warns of CUDA tools without a GPU, as on login nodes.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    # At import Megatron warns once per optional GPU package that is absent; `prolong doctor` says it better.
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
