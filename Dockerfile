# Two images: --target server (CPU and CUDA) and --target operator (no torch, no compiler).
#
#   docker build --target server -t octavo-server .
#   python3 e2e/cluster/cli.py images        # no registry to pull from: a Debian base is made here
#
# Layers go from heavy and still to light and moving: the locked packages (gigabytes with torch)
# are one layer that only the lock changes, our code is one of a few megabytes.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1
RUN echo 'octavo:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd \
 && echo 'octavo:x:10001:' >> /etc/group

# pip installs into /opt/venv from outside of it, so that the images need no pip.
FROM base AS tools
ARG PIP_CERT
ARG PIP_INDEX_URL
COPY requirements/build.lock /src/requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/venv \
 && HOME=/root /opt/tools/bin/pip install --require-hashes -r /src/requirements/build.lock

FROM tools AS compiler
RUN apt-get update -q \
 && apt-get install -y --no-install-recommends g++ \
 && { test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
      || apt-get install -y --no-install-recommends python3-dev; } \
 && rm -rf /var/lib/apt/lists/*

# OCTAVO_CUDA=OFF leaves out the GPU's module and the minutes that it takes to compile. Torch has
# CUDA with it in either case; the driver is the node's, mounted by its container runtime.
ARG OCTAVO_CUDA=ON
ARG PIP_CERT
ARG PIP_INDEX_URL
COPY requirements/cuda.lock /src/requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$OCTAVO_CUDA" = ON ]; then \
      HOME=/root /opt/tools/bin/pip install --require-hashes -r /src/requirements/cuda.lock; \
    fi
ENV SKBUILD_CMAKE_DEFINE=OCTAVO_CUDA=${OCTAVO_CUDA}

# The compiled modules first, from their own sources: a change of Python code compiles none.
FROM compiler AS native
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
RUN export PATH=/opt/tools/bin:$PATH \
 && mkdir -p operator/octavo_operator server/octavo \
 && pip wheel --no-index --no-deps --no-build-isolation --no-cache-dir -w /tmp/native .

FROM native AS server-code
COPY operator operator
COPY server server
RUN export PATH=/opt/tools/bin:$PATH \
 && pip wheel --no-index --no-deps --no-build-isolation --no-cache-dir -w /tmp/dist . \
 && pip --python /opt/venv/bin/python install --root /staging --no-index --no-deps /tmp/dist/*.whl

FROM tools AS operator-code
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels/octavo_kernels kernels/octavo_kernels
COPY operator operator
COPY server server
RUN export OCTAVO_PURE=1 PATH=/opt/tools/bin:$PATH \
 && pip wheel --no-index --no-deps --no-build-isolation --no-cache-dir -w /tmp/dist . \
 && pip --python /opt/venv/bin/python install --root /staging --no-index --no-deps /tmp/dist/*.whl

FROM base AS server-packages
ARG PIP_CERT
ARG PIP_INDEX_URL
COPY requirements/server.lock /opt/octavo/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /tmp/tools && python3 -m venv --without-pip /opt/venv \
 && HOME=/root /tmp/tools/bin/pip --python /opt/venv/bin/python install \
      --require-hashes --only-binary :all: -r /opt/octavo/server.lock \
 && rm -rf /tmp/tools
# The official base has no bytecode of the standard library. Where this runs the root filesystem is
# read-only, and so both processes would compile what they import anew: half a second of each start.
RUN python3 -m compileall -q -x '/(test|tests|idlelib|lib2to3|site-packages|dist-packages)/' \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

FROM base AS operator-packages
ARG PIP_CERT
ARG PIP_INDEX_URL
COPY requirements/operator.lock /opt/octavo/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /tmp/tools && python3 -m venv --without-pip /opt/venv \
 && HOME=/root /tmp/tools/bin/pip --python /opt/venv/bin/python install \
      --require-hashes -r /opt/octavo/operator.lock \
 && rm -rf /tmp/tools

# The root filesystem is read-only where these run: bytecode was compiled at installation.
FROM operator-packages AS operator
COPY --from=operator-code /staging /
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["octavo-operator"]

FROM server-packages AS server
COPY --from=server-code /staging /
COPY e2e/tinymodel/model /opt/octavo/models/tiny
ENV PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["octavo"]
