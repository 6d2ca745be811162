# GDRQ with 8-bit weights, 4 groups a layer, and 8-bit activations; every key is explained in gdrq_mm/core/config.py.
runner_type = 'gdrq_mm.openmmlab.QuantRunner'
quantization = dict(method='gdrq', weight=dict(bits=8), activation=dict(bits=8), deployable=True)
