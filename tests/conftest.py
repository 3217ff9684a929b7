"""Networks this small run fastest on one thread, above all on a busy machine; tests of threads ask for more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it
