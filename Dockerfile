# The search service on a CPU. Targets: `service` (models are mounted at /models) and `baked` (they are in the image).
#   docker build --target service --build-arg PIP_EXTRA_INDEX_URL=INDEX -t semid:service .
#   docker build --target baked --build-arg MODELS="--clip-only --clip ViT-B-32" -t semid:baked .
# INDEX is a registry with torch and torchvision for CPUs. Without it both come from pip's own, where they bring CUDA:
# that works too, and makes the image several GB larger. PIP_INDEX_URL takes the place of pip's own.
# Without a network models come from a mirror: --build-context mirror=FOLDER --build-arg SOURCE=file:///mirror
# No container could be run where this was written: each step was run there outside of one, and the build as a whole nowhere.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS="images onnx hub serve"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/semid
ENV PATH=/opt/semid/bin:$PATH
# What the service needs, at the versions of the lock, in a layer that changes of the code leave as it is.
COPY requirements.lock pyproject.toml ./
# The lock says which setuptools, too.
# hadolint ignore=DL3013
RUN python -c "import sys, tomllib as t; p = t.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *(d for e in sys.argv[1:] for d in p['optional-dependencies'][e]), sep='\n')" \
        ${EXTRAS} > wanted.txt \
    && pip install --constraint requirements.lock --requirement wanted.txt "setuptools>=77"
COPY README.md ./
COPY semid semid
RUN pip install --no-deps --no-build-isolation .

FROM python:${PYTHON}-slim AS service
# Debian keeps no version but the newest: a pinned one could not be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home semid
COPY --from=build /opt/semid /opt/semid
ENV PATH=/opt/semid/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp
WORKDIR /srv
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["semid"]
CMD ["serve", "--host", "0.0.0.0", "--database", "/db", "--model-path", "onnx:/models/onnx/clip_ViT-B-32"]

FROM scratch AS mirror

FROM build AS models
# To export a cross-encoder and to train a regressor takes more than to serve them.
RUN pip install --no-build-isolation --constraint requirements.lock ".[texts,plots]"
ARG MODELS="--clip-only --clip ViT-B-32"
ARG SOURCE=hub
RUN --mount=type=bind,from=mirror,target=/mirror \
    semid models download ${MODELS} --source "${SOURCE}" --models-dir /models --quiet \
    && semid models verify --models-dir /models

FROM service AS baked
COPY --from=models /models /models
