# GDRQ with 3-bit weights, 4 groups a layer, and 3-bit activations; every key is explained in gdrq_mm/core/config.py.
runner_type = 'gdrq_mm.openmmlab.QuantRunner'
quantization = dict(method='gdrq', weight=dict(bits=3), activation=dict(bits=3), deployable=True)
