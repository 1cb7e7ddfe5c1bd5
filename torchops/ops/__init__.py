"""One module per operator: functional wrapper, autograd Functions, fake kernels, vmap rules.

The last two are in _<op>_rules.py where the module would grow too long.
"""
