# Slim, non-root, with the CPU build of torch. Build: docker build -t crucible-kitchen .
# For an accelerator: docker build --build-arg TORCH_BACKEND=auto -t crucible-kitchen .
FROM python:3.11-slim

ARG TORCH_BACKEND=cpu

RUN useradd --create-home --uid 10001 kitchen && pip install --no-cache-dir uv
WORKDIR /app
COPY constraints.txt pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY crucible_kitchen crucible_kitchen
COPY adapters adapters
RUN uv pip install --system --no-cache --torch-backend=${TORCH_BACKEND} -c constraints.txt ".[torch]" \
    && mkdir /data && chown kitchen /data

USER kitchen
ENV CRUCIBLE_HOME=/data
VOLUME /data
EXPOSE 9100
ENTRYPOINT ["crucible-kitchen"]
CMD ["--help"]
