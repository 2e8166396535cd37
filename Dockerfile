# Worker image for Dataflow, and for Flink and Spark with --environment_type=DOCKER or EXTERNAL.
#   docker build --build-arg EXTRAS=gcs -t captionlib-worker:0.1.0 .
# PyTorch's wheels include CUDA, so the host needs only NVIDIA's driver. Without a GPU, the same image runs on the CPU.
# Beam's base image contains the boot program that every runner starts.
ARG PYTHON_VERSION=3.12
ARG BEAM_VERSION=2.77.0

FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir "hatchling>=1.27" && python -m hatchling build --target wheel --directory /wheel

FROM apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION}
ARG EXTRAS=s3,gcs
COPY --from=wheel /wheel /wheel
COPY requirements.lock /wheel/
RUN pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --constraint /wheel/requirements.lock "$(ls /wheel/*.whl)[${EXTRAS}]" \
    && uv pip check --system \
    && rm -rf /wheel
# Each worker process computes one shard at a time on one core.
ENV OMP_NUM_THREADS=1
