# otpo in a container, for CPUs or for NVIDIA GPUs:
#
#   docker build --target cpu -t otpo:cpu .
#   docker build --target cuda -t otpo:cuda .
#   docker run --rm --gpus all -v "$PWD":/work otpo:cuda align --config recipe.yaml
#
# Models and data are cached in /cache: `-v otpo-cache:/cache` keeps them.

FROM python:3.12-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface
# Triton and torch.compile build small modules while they run, which takes a C++ compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY otpo otpo
COPY moe_backbone moe_backbone
COPY kernels kernels

FROM base AS cpu
ARG EXTRAS=eval,plots
# torch's build without CUDA, of the version that constraints.txt pins.
RUN pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
RUN pip install -c constraints.txt ".[${EXTRAS}]"
WORKDIR /work
ENTRYPOINT ["otpo"]
CMD ["--help"]

FROM base AS cuda
# `--build-arg EXTRAS=eval,plots,triton,wandb,deepspeed` adds ZeRO. What DeepSpeed compiles of its own, such as its fused and offloaded
# optimizers, needs CUDA's compiler, which this image does not have; the bundled configurations use torch's optimizers.
ARG EXTRAS=eval,plots,triton,wandb
# PyPI's torch brings CUDA's libraries, the machine brings the driver (nvidia-container-toolkit).
RUN pip install -c constraints.txt ".[${EXTRAS}]"
WORKDIR /work
ENTRYPOINT ["otpo"]
CMD ["--help"]
