# SGD for small classifiers at batches of 64 to 128; each config sets its own epochs.
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True))
