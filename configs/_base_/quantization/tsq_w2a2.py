# TSQ with 2-bit weights and 2-bit activations; see gdrq_mm/core/quantizers/tsq.py.
_base_ = './gdrq_w2a2.py'
quantization = dict(method='tsq')
