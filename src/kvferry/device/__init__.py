"""What touches the GPU below PyTorch: kernels compiled at run time."""
