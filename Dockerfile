# Two stages on Debian's own Python: the second has neither pip nor a compiler.
FROM docker.io/library/debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv
# Where a package index has a certificate authority of its own: its file within the build, mounted.
ARG PIP_CERT
WORKDIR /src
COPY requirements.lock requirements-build.lock ./
# pip stays in a folder that is left behind: what is copied below never had one.
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/pullcache \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements-build.lock \
 && /opt/build/bin/pip --python /opt/pullcache/bin/python install --no-cache-dir --require-hashes --only-binary :all: \
      -r requirements.lock
COPY pyproject.toml README.md ./
COPY proxy proxy
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel . \
 && /opt/build/bin/pip --python /opt/pullcache/bin/python install --no-cache-dir --no-deps --no-index /wheel/*.whl

FROM docker.io/library/debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* \
 && install -d -o 65532 -g 65532 -m 700 /var/lib/pullcache
COPY --from=build /opt/pullcache /opt/pullcache
USER 65532:65532
ENV PATH=/opt/pullcache/bin:$PATH PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=/var/lib
VOLUME /var/lib/pullcache
# 5001 (admin) answers within the container alone, unless a configuration opens it, which takes a token or a client CA.
EXPOSE 5000 5001
# Without a shell and without curl. It asks 127.0.0.1:5001: where 'admin' is another port, run it with --health-cmd.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["pullcache", "health"]
ENTRYPOINT ["pullcache"]
CMD ["serve", "--listen", ":5000"]
