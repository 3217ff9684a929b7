"""gafext's command line under Accelerate's FSDP 2 on CPUs: Accelerate takes it up on GPUs alone, PyTorch on both."""

import sys

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from gafext.cli import main
from gafext.training import run


class Sharded(Accelerator):
    version = 2

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=self.version)
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    run.Accelerator = Sharded
    sys.exit(main(sys.argv[1:]))
