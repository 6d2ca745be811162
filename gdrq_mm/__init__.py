"""GDRQ low-bit quantization for OpenMMLab models."""

__version__ = '0.1.0'
