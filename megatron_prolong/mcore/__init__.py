"""The one seam to Megatron-Core and Transformer Engine: nothing outside this package imports either."""

import warnings

with warnings.catch_warnings():
    # At import Megatron warns once per optional GPU package that is absent; `prolong doctor` says it better.
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
