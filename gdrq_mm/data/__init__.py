"""Data sets: builds the embedded one, and brings those that the user has into the layouts that OpenMMLab expects."""
