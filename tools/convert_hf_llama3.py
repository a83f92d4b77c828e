#!/usr/bin/env python3
"""Convert a Hugging Face Llama to Megatron's format: `python tools/convert_hf_llama3.py HF_DIR OUT`.

The same as `prolong convert to-megatron`, under the name that people look for; `prolong convert to-hf` goes back.
"""

import sys

from megatron_prolong.cli.main import run

sys.argv[1:1] = ["convert", "to-megatron"]
run()
