# One image for every step, every worker, MLflow and serving.
#   docker build -t ghcr.io/des/des-python:0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" .
#   docker build -t ghcr.io/des/des-python:0.1.0-cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# "python" stands in the name because kfp's local runner looks for it.

# Any Debian-based image with python3.11, venv and pip.
ARG BASE=docker.io/library/python:3.11-slim
FROM ${BASE}

# Index of torch's build; empty: whatever pip finds, usually the CUDA build.
ARG TORCH_INDEX=""

# PYTHONSAFEPATH: a folder named components/ or k8s/ where a step happens to run must not shadow ours.
# /tmp is the one folder written to, so a read-only root needs one emptyDir there.
ENV PATH=/opt/des/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    TMPDIR=/tmp \
    NUMBA_CACHE_DIR=/tmp/numba \
    MPLCONFIGDIR=/tmp/matplotlib \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet

# The base may have another user. A passwd entry, because getpass fails for an unknown uid.
USER 0:0
RUN groupadd --gid 10001 des \
    && useradd --uid 10001 --gid des --home-dir /tmp --no-create-home --shell /usr/sbin/nologin des \
    && python3.11 -m venv /opt/des

# Dependencies change seldom and weigh gigabytes: a layer of their own, from the locked versions.
WORKDIR /usr/src/des
COPY pyproject.toml requirements.lock ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['ray'], 'setuptools', sep='\n')" > runtime.txt \
    && pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c requirements.lock -r runtime.txt

COPY LICENSE README.md ./
COPY des_core des_core
COPY components components
COPY pipelines pipelines
COPY k8s k8s
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# Last, because they change with every build. DES_REVISION: the commit that a model's lineage names.
ARG VERSION=0.1.0
ARG REVISION=""
ENV DES_REVISION=${REVISION}
LABEL org.opencontainers.image.title="des" \
      org.opencontainers.image.description="Click models trained synchronously over many workers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER 10001:10001
WORKDIR /tmp
CMD ["des", "--help"]
