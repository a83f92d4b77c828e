# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build -t prolong .                 # GPUs: NVIDIA's PyTorch image
#   docker build -t prolong-cpu --target cpu .  # laptops and CI: everything but speed
# Run with --ipc=host (or --shm-size=16g): NCCL and gloo talk through /dev/shm.
# tools/check_dockerfile_steps.sh runs the cpu stage's steps in a clean root without Docker.

# ---- cpu ---------------------------------------------------------------------------------------------------
FROM python:3.11.13-slim-bookworm AS cpu

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PATH=/opt/prolong/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# PyPI's torch for x86-64 carries CUDA (5 GB). Give PyTorch's CPU wheel index here for the small one.
ARG TORCH_INDEX_URL=""
ARG TORCH_VERSION=2.13.0

WORKDIR /src
COPY setup.py pyproject.toml README.md ./
COPY megatron_prolong ./megatron_prolong
COPY tools/constraints.txt ./tools/constraints.txt

# hadolint ignore=DL3013 # the dot is us; everything else is pinned by the constraints
RUN python -m venv /opt/prolong \
 && pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==$TORCH_VERSION" \
 && pip install --no-cache-dir --constraint tools/constraints.txt . \
 && pip check

RUN useradd --create-home --uid 10001 prolong \
 && install --directory --owner=prolong --group=prolong /workspace
WORKDIR /workspace
COPY examples ./examples
USER 10001:10001
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s CMD ["prolong", "doctor", "--quick"]
CMD ["prolong", "--help"]

# ---- gpu (default) -----------------------------------------------------------------------------------------
# Why 26.02: it was the newest image when megatron-core 0.16.1 came out (March 2026), and the first with
# PyTorch 2.11, the oldest we test; Python 3.12; Apex, Transformer Engine 2.12 and CUDA 13.1 come built for it
# (26.01 has 2.11, but PyTorch 2.10). Check a newer tag with `prolong doctor`, against the ranges in setup.py, and
# tests -m gpu.
FROM nvcr.io/nvidia/pytorch:26.02-py3 AS gpu

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /src
COPY setup.py pyproject.toml README.md ./
COPY megatron_prolong ./megatron_prolong

# The image's PyTorch is a build of its own (2.11.0a0+….nv26.02, in no registry) and counts as older than 2.11:
# a plain `pip install .` would replace it. So we come without dependencies, and those without torch and without
# tensorboard, of which the image has one that suits its numpy; what the image has pinned in
# /etc/pip/constraint.txt (its PIP_CONSTRAINT) stays as it is. megatron-core is the one that CI tests.
RUN pip install --no-cache-dir --no-deps . \
 && python -c "import re; from importlib.metadata import requires; print('\n'.join(r for r in requires('megatron-prolong') if 'extra ==' not in r and re.match('[a-z-]+', r)[0] not in ('torch', 'tensorboard')))" > /tmp/requirements.txt \
 && pip install --no-cache-dir --requirement /tmp/requirements.txt megatron-core==0.16.1 \
 && rm /tmp/requirements.txt \
 && python -c "import torch, megatron.core, tensorboard; assert torch.version.cuda and '.nv' in torch.__version__, torch.__version__"

RUN useradd --create-home --uid 10001 prolong \
 && install --directory --owner=prolong --group=prolong /workspace
WORKDIR /workspace
COPY examples ./examples
USER 10001:10001
HEALTHCHECK --interval=5m --timeout=60s --start-period=60s CMD ["prolong", "doctor", "--quick"]
CMD ["prolong", "--help"]
