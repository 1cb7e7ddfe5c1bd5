"""One module per operator: functional wrapper, autograd Functions, fake kernels, vmap rules."""
