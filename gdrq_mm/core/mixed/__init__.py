"""Mixed precision: bits for each layer's weight and input, so that a budget is kept and the model loses least.

    choices.py      what there is to choose, and quantizers with each number of bits beside those of the model
    sensitivity.py  what each choice costs: the squared error, weighted by squared gradients
    budgets.py      what layers cost: size, bit operations, time
    program.py      the integer program that chooses, and uniform bits beside it
    allocation.py   the answer, as `overrides` of a config
    search.py       the other way: bits that are learned

HAQ (Wang et al., CVPR 2019, arXiv:1811.08886) and DNAS (Wu et al., arXiv:1812.00090) set the task; the integer program
is that of HAWQ-V3 (Yao et al., ICML 2021, arXiv:2011.10680).
"""
