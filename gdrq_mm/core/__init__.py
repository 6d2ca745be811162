"""GDRQ in plain torch: the arithmetic, the quantizers, the layers, and how a model is changed. Nothing here knows
OpenMMLab, ONNX or a runtime."""
