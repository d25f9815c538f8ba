# Two stages on Debian's own Python: the second has neither pip nor a compiler.
FROM docker.io/library/debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv
# Where a package index has a certificate authority of its own: its file within the build, mounted.
ARG PIP_CERT
WORKDIR /src
COPY requirements.lock requirements-build.lock ./
RUN python3 -m venv /opt/build && python3 -m venv /opt/pullcache \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements-build.lock \
 && /opt/pullcache/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md ./
COPY proxy proxy
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel . \
 && /opt/pullcache/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl \
 && /opt/pullcache/bin/pip uninstall --yes pip setuptools

FROM docker.io/library/debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* \
 && install -d -o 65532 -g 65532 -m 700 /var/lib/pullcache
COPY --from=build /opt/pullcache /opt/pullcache
USER 65532:65532
ENV PATH=/opt/pullcache/bin:$PATH PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=/var/lib
VOLUME /var/lib/pullcache
EXPOSE 5000 5001
ENTRYPOINT ["pullcache"]
CMD ["serve", "--listen", ":5000", "--admin", ":5001"]
