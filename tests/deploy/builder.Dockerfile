# What the tests have in place of the Rust image that the repository's Dockerfile starts from: Debian, a C compiler, and this
# machine's Rust. The crates are there already, since the tests' Docker reaches no registry.
FROM debian:bookworm-slim AS shipped
COPY usr /usr/
COPY bin /usr/local/bin/
COPY lib /usr/local/lib/
COPY registry /usr/local/cargo/registry/
ENV CARGO_HOME=/usr/local/cargo CARGO_NET_OFFLINE=true

# The same, but nothing is optimised, which takes a third of the time.
FROM shipped AS quick
ENV CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_DEBUG=false
