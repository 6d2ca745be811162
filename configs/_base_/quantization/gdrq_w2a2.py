# GDRQ with 2-bit weights and 2-bit activations; every key is explained in gdrq_mm/config.py.
runner_type = 'gdrq_mm.runner.QuantRunner'
quantization = dict(
    weight=dict(method='gdrq', bits=2, groups=4),
    activation=dict(method='gdrq', bits=2, range='auto'),
    first_last_bits=8,
    deployable=True,
    schedule=dict(reshape=0.0, freeze=1.0),
)
