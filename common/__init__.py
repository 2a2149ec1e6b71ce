"""The ground floor: what every task uses. Imported before torch, it says how torch's threads wait."""

import os

# A thread that spins while it waits makes small kernels up to 20 times slower on a busy machine; read by OpenMP when
# torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
