# The image: the program, its configuration, the certificate authorities, and an empty /data. Nothing else is added to
# the base, and nothing is run in it, so a base without a shell will do.
#
#   docker build .
#   docker build --build-arg BASE=IMAGE .           any other base, such as a "distroless" one with a C library: smaller still
#
# The base needs the C library of the builder's Debian, or a newer one.
ARG BUILDER=rust:1.95.0-bookworm
ARG BASE=debian:bookworm-slim

FROM ${BUILDER} AS build
WORKDIR /src
COPY . .
# The symbols stay, for readable backtraces; what debuggers want goes.
RUN cargo build --release --locked \
    && install -D target/release/artifact-cache /image/usr/local/bin/artifact-cache \
    && strip --strip-debug /image/usr/local/bin/artifact-cache \
    && install -D -m 644 deploy/config.yaml /image/app/config.yaml \
    && install -D -m 644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt \
    && mkdir -p /image/data/cache

FROM ${BASE}
COPY --from=build /image/usr/local/bin/artifact-cache /usr/local/bin/artifact-cache
COPY --from=build /image/etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /image/app /app
COPY --from=build --chown=1000:1000 /image/data /data
# SQLite's temporary files, of a VACUUM for one, are as large as the database. /data is the only place to write to.
ENV SQLITE_TMPDIR=/data
WORKDIR /app
USER 1000:1000
VOLUME /data
EXPOSE 8080 9090
# Degraded counts as healthy: what is stored is still served, and a restart would not help.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["/usr/local/bin/artifact-cache", "health"]
ENTRYPOINT ["/usr/local/bin/artifact-cache"]
CMD ["serve"]
