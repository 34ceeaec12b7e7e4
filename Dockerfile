# syntax=docker/dockerfile:1
# The image for Kubernetes, for `ray up` and for anyone who wants UMBRELLA in a container.
#     docker build --tag umbrella:cuda --build-arg COMMIT=$(git rev-parse HEAD) .
#     docker build --tag umbrella:cpu --build-arg ACCELERATOR=cpu --build-arg TORCH_INDEX=... .
# COMMIT: what runs in MLflow are told of the code, since the image has no checkout. TORCH_INDEX: where pip finds torch, such as pytorch.org's index of CPU builds; without it the registry's build comes, which
# brings CUDA along (4 GB). A GPU needs NVIDIA's driver and container toolkit on the host and nothing else in here.
FROM python:3.11-slim

ARG ACCELERATOR=cuda
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# git: MLflow looks for it; rsync: `ray up`; wget: KubeRay's probes; gcc: compiled layers (train.compile).
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git rsync wget $([ "$ACCELERATOR" = cpu ] || echo gcc libc6-dev) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 umbrella

WORKDIR /opt/umbrella
COPY pyproject.toml constraints.txt ./
# What pyproject.toml asks for in the versions of constraints.txt, before the code: a change of the code keeps this layer.
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX" torch; fi \
    && python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["gpu"], sep="\n")' > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt
COPY README.md LICENSE ./
COPY umbrella umbrella
COPY experiments experiments
COPY ray_configs ray_configs
RUN pip install --no-deps --editable .

ARG COMMIT=""
ENV UMBRELLA_COMMIT=$COMMIT
USER 1000
CMD ["python", "experiments/tune.py", "--dry-run"]
