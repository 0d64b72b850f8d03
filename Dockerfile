# The demo on a CPU: docker build -t sparsedm . && docker run -p 7860:7860 sparsedm
# The compiler stays in the first stage; the second has its kernels, for two kinds of CPUs.

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Where pip finds PyTorch for CPUs alone, which is much smaller: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
COPY requirements.txt .
RUN pip install --no-cache-dir $(grep -E '^(torch|torchvision|diffusers|gradio)==' requirements.txt)
COPY pyproject.toml README.md LICENSE ./
COPY sparsedm sparsedm
RUN pip install --no-cache-dir .
RUN python -m sparsedm.packing.kernels.build /opt/kernels

FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=user /opt/kernels /opt/kernels
USER user
WORKDIR /home/user
COPY app.py .
ENV PATH=/opt/venv/bin:$PATH SPARSEDM_KERNELS=/opt/kernels
ENV GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=7860 GRADIO_ANALYTICS_ENABLED=False HF_HUB_OFFLINE=1
EXPOSE 7860
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/health')"]
CMD ["python", "app.py"]
