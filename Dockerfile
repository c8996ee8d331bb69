# syntax=docker/dockerfile:1.7
# One image for the heads and the workers of a cluster, which must have the same Ray and Python.
#
#   docker build --target gpu -t registry.example.com/phi4ray:0.1.0-gpu .
#   docker build --target cpu -t phi4ray:0.1.0-cpu .       with the tiny model, for kind
#
# Ray, vLLM and all else are pinned in docker/requirements-*.txt. Layers, from the one that changes
# least: system, packages, phi4ray.

ARG PYTHON_VERSION=3.12.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS wheel
WORKDIR /src
RUN pip install --no-cache-dir hatchling==1.27.0
COPY pyproject.toml LICENSE ./
COPY phi4ray phi4ray
COPY cluster cluster
COPY jobs jobs
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:${PYTHON_VERSION}-slim-bookworm AS system
# g++: Triton and torch.compile. procps, wget: preStop hooks and KubeRay's probes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 ray \
    && useradd --uid 1000 --gid 1000 --create-home ray \
    && install -d -o ray -g ray /cache
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1

# A virtual environment is made where compilers of its packages may be needed, and only it is taken.
FROM system AS gpu-packages
COPY docker/requirements-gpu.txt .
RUN python -m venv /venv && pip install --no-cache-dir --no-deps -r requirements-gpu.txt

FROM system AS cpu-packages
COPY docker/requirements-cpu.txt .
RUN python -m venv /venv && pip install --no-cache-dir --no-deps -r requirements-cpu.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu

FROM system AS gpu
# The driver comes from the node. FlashInfer's sampler would be compiled with nvcc at first use.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLLM_USE_FLASHINFER_SAMPLER=0
COPY --from=gpu-packages /venv /venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl
USER 1000:1000
WORKDIR /home/ray

FROM system AS cpu
COPY --from=cpu-packages /venv /venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl
USER 1000:1000
WORKDIR /home/ray
COPY --chown=ray:ray examples examples
RUN python -m phi4ray.train.tiny tiny-phi-4
