"""From the trained model to integers: merging, packing, ONNX, runtimes, and the proof that nothing changed."""
