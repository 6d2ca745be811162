# GDRQ with 2-bit weights, 4 groups a layer, and 4-bit activations; every key is explained in gdrq_mm/core/config.py.
runner_type = 'gdrq_mm.openmmlab.QuantRunner'
quantization = dict(method='gdrq', weight=dict(bits=2), activation=dict(bits=4), deployable=True)
