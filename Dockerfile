# lt-gguf in an image: docker build -t lt-gguf . (how to use it: docs/how-to/deploy.md)

FROM debian:bookworm-slim AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates g++ git make python3-dev python3-venv
WORKDIR /lt-gguf
COPY . .
# A wheel rather than `pip install .`: it has the code for every x86-64, whatever machine builds the image.
RUN make wheel

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3-venv && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=wheel,source=/lt-gguf/dist,target=/dist \
    python3 -m venv /opt/lt-gguf && /opt/lt-gguf/bin/pip install --no-cache-dir /dist/*.whl
RUN useradd --uid 1000 lt-gguf && install -d -o lt-gguf -g lt-gguf /cache /models
ENV PATH=/opt/lt-gguf/bin:$PATH LT_GGUF_CACHE=/cache
USER lt-gguf
WORKDIR /models
VOLUME /cache
EXPOSE 8080
ENTRYPOINT ["lt-gguf"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080"]
