"""GPU kernels that go from tensor to tile bytes in one launch, and back: codec and packer fused, so that nothing but
the tensor and the encoded bytes crosses device memory. Imported only when a CUDA tensor is met.

CUDA C++ (*.cu), because the coders need warp votes; compiled at first use by NVRTC. `frames`: whole tensors; `slots`:
chunks of pages.
"""

# Whoever lacks them learns it here, with the remedy, and not at the first launch.
from cuda.bindings import driver as _driver  # noqa: F401
from cuda.bindings import nvrtc as _nvrtc  # noqa: F401
