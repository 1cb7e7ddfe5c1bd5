"""One module per operator: functional wrapper, autograd Functions, fake kernels, vmap rules.

The last two are in _<op>_rules.py where there are many, or where two operators share them.
"""
