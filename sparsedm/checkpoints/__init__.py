"""Model folders, packed files, official weights, ONNX, the hub."""
