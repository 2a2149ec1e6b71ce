"""The ground floor: what every task uses. Imported before torch, it says how torch's threads wait and what fp32 is."""

import os
import tempfile
from pathlib import Path

# A thread that spins while it waits makes small kernels up to 20 times slower on a busy machine; read by OpenMP when
# torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# fp32 is fp32, whatever the environment allows: oneDNN would multiply in bf16 on a CPU that has it, cuBLAS and cuDNN in
# TF32. What torch itself allows is set by `common.engine.pick_device`.
os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] = "STRICT"
for name in ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"):
    os.environ.pop(name, None)

# A user without HOME and without an entry in the system's list, as in many containers: a library below mmengine asks
# for a cache folder as soon as it is imported, and fails.
try:
    Path.home()
except RuntimeError:
    os.environ.setdefault("XDG_CACHE_HOME", tempfile.gettempdir())
