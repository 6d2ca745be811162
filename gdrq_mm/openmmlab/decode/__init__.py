"""What mmdet, mmseg and mmpretrain do in front of a network and behind it, as modules that can be exported to ONNX."""
