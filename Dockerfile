# syntax=docker/dockerfile:1
# Two images of one program; docs/containers.md says which is for whom.
#
#   docker build -t portolan:0.1.0 .                        slim: the program, and no shell. For servers by URL
#   docker build -t portolan:0.1.0-stdio --target stdio .   with Node and uv, for servers that are commands (npx, uvx)
#
# Both run as 65532, write to /var/lib/portolan alone (`--read-only` works), and hold no secret: those come when they start.

# That of rust-version in Cargo.toml or later; its glibc must be that of the images below, or an older one.
ARG RUST=1.95-slim-bookworm
ARG UV=0.13.9

FROM ghcr.io/astral-sh/uv:${UV} AS uv

FROM rust:${RUST} AS build
WORKDIR /src
# A layer of the dependencies alone: it is built again when these two files change. What was built of the stand-in sources is
# taken away, because Cargo compares times, and files keep theirs when they are copied.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src \
    && echo 'fn main() {}' > build.rs \
    && cp build.rs src/main.rs \
    && touch src/lib.rs \
    && cargo build --release --locked --bin portolan \
    && cargo clean --release --locked --package portolan
COPY build.rs openapi.yaml ./
COPY console console
COPY migrations migrations
COPY src src
RUN cargo build --release --locked --bin portolan \
    && install -d -m 700 /data

FROM node:22-bookworm-slim AS stdio
# uv uses this Python where a server can, and fetches another one where not. Certificates are what servers are trusted by.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git python3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 65532 nonroot \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin nonroot
COPY --from=uv /uv /uvx /usr/local/bin/
COPY --from=build /src/target/release/portolan /usr/local/bin/portolan
COPY --from=build --chown=65532:65532 --chmod=700 /data /var/lib/portolan
ENV PORTOLAN_LISTEN=0.0.0.0:8283 PORTOLAN_DATA_DIR=/var/lib/portolan
WORKDIR /var/lib/portolan
VOLUME ["/var/lib/portolan"]
EXPOSE 8283
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["/usr/local/bin/portolan", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/portolan"]
LABEL org.opencontainers.image.title="Portolan" \
    org.opencontainers.image.description="A self-hosted server for the MCP-servers part of the Letta API, with Node and uv" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0"

# glibc, libgcc and certificates, no shell. The last stage is what is built without --target.
FROM gcr.io/distroless/cc-debian12:nonroot AS slim
COPY --from=build /src/target/release/portolan /usr/local/bin/portolan
COPY --from=build --chown=65532:65532 --chmod=700 /data /var/lib/portolan
ENV PORTOLAN_LISTEN=0.0.0.0:8283 PORTOLAN_DATA_DIR=/var/lib/portolan
WORKDIR /var/lib/portolan
VOLUME ["/var/lib/portolan"]
EXPOSE 8283
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["/usr/local/bin/portolan", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/portolan"]
LABEL org.opencontainers.image.title="Portolan" \
    org.opencontainers.image.description="A self-hosted server for the MCP-servers part of the Letta API" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0"
