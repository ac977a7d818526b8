# Training and evaluation on NVIDIA GPUs, without root.
#
#   docker build -t hybrid_scale .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --user "$(id -u):$(id -g)" \
#       -v "$PWD/data:/srv/hybrid_scale/data" -v "$PWD/models:/srv/hybrid_scale/models" -v "$PWD/runs:/srv/hybrid_scale/runs" \
#       hybrid_scale accelerate launch --num_processes 8 launch/train.py CONFIG.yaml run.directory=runs/first
#
# --ipc=host: NCCL and data workers share memory. With --user, the mounted folders keep your ownership.
#
# Base image: the pinned torch 2.13.0 wheel is built for CUDA 13.0, and DeepSpeed compiles its parts with the image's nvcc only if
# that is 13.0 too (for CUDA 13 it accepts no other minor version). Hence `devel` and 13.0. The host needs driver 580 or newer.
# faiss-gpu's wheel is for CUDA 12 and brings its libraries as wheels (cublas 12 beside torch's cublas 13, other file names).
# Read from the wheels' metadata and DeepSpeed's source; building and running the image on a GPU is still to be verified.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# python3 is 3.12. The headers and g++ are for what Triton and DeepSpeed compile at run time, git for the manifest of a run.
# hadolint ignore=DL3008 (the distribution's security updates are wanted; Python packages are pinned by constraints.txt)
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Caches are writable by any user id, for `docker run --user`.
ARG UID=10001
RUN useradd --uid "${UID}" --create-home --shell /bin/bash trainer \
    && install -d -o trainer -g trainer /opt/venv /srv/hybrid_scale \
    && install -d -m 1777 /var/cache/hybrid_scale /var/cache/hybrid_scale/huggingface /var/cache/hybrid_scale/torch_extensions

ENV PATH=/opt/venv/bin:${PATH} \
    CUDA_HOME=/usr/local/cuda \
    HF_HOME=/var/cache/hybrid_scale/huggingface \
    TORCH_EXTENSIONS_DIR=/var/cache/hybrid_scale/torch_extensions \
    TRITON_CACHE_DIR=/var/cache/hybrid_scale/triton \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
    TOKENIZERS_PARALLELISM=false \
    PYTHONUNBUFFERED=1

WORKDIR /srv/hybrid_scale
USER trainer

# First what decides the installation, so that a change of our code doesn't install torch again. The install is editable: the
# code copied below is found without another step.
COPY --chown=trainer:trainer pyproject.toml constraints.txt LICENSE ./
COPY --chown=trainer:trainer .ci/install .ci/install
COPY --chown=trainer:trainer hybrid_scale/__init__.py hybrid_scale/__init__.py
RUN .ci/install /opt/venv gpu && rm -rf /home/trainer/.cache

COPY --chown=trainer:trainer . .

CMD ["python", "launch/train.py", "--help"]
