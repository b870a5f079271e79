# The images of Tercet, a target for each: operator, csi, node (agent, engine, attacher).
#
#   docker build --target operator -t tercet-operator:0.1.0 .      (BuildKit; likewise csi, node)
#
# BASE is what they run on: a Debian 12, which may have their packages already; then nothing is
# fetched for it. WHEELS says where our programs come from: `built` compiles them in here, `given`
# takes build/wheels as `make wheels` has left it: `make images` does that, with a base made of
# Debian's packages, where no registry can be reached.

ARG BASE=debian:bookworm-slim
ARG RUST=rust:1.95-slim-bookworm
ARG GO=golang:1.26-bookworm
ARG WHEELS=built

# ---- our distributions and what they need, as wheels

FROM ${GO} AS go

FROM ${RUST} AS built
COPY --from=go /usr/local/go /usr/local/go
ENV PATH=/usr/local/go/bin:$PATH
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev make python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make wheels

FROM scratch AS given
COPY build/wheels /src/build/wheels

FROM ${WHEELS} AS wheels

# ---- what all images stand on: Python, and nothing that could install more

FROM ${BASE} AS base
COPY images/packages images/not-needed images/install-packages /usr/share/tercet/
RUN sh /usr/share/tercet/install-packages all
ENV PATH=/opt/tercet/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# ---- a Python environment for each image, compiled: the root file systems are read-only

FROM base AS installer
RUN sh /usr/share/tercet/install-packages build && python3 -m venv /opt/pip
COPY images/install-wheels /usr/share/tercet/
COPY --from=wheels /src/build/wheels /wheels

FROM installer AS operator-files
RUN sh /usr/share/tercet/install-wheels tercet-operator

FROM installer AS csi-files
RUN sh /usr/share/tercet/install-wheels 'tercet-csi[controller]'

FROM installer AS node-files
RUN sh /usr/share/tercet/install-wheels tercet-node tercet-engine

# ---- the images

FROM base AS operator
COPY --from=operator-files /opt/tercet /opt/tercet
USER 65532:65532
ENTRYPOINT ["tercet-operator"]

# File systems, mounts and modules are made by root; the controller is run as another user.
FROM base AS csi
RUN sh /usr/share/tercet/install-packages csi
COPY --from=csi-files /opt/tercet /opt/tercet
ENTRYPOINT ["tercet-csi"]

# Engine and attacher need root for devices; the agent is run as another user.
FROM base AS node
COPY --from=node-files /opt/tercet /opt/tercet
ENTRYPOINT ["tercet-agent"]
