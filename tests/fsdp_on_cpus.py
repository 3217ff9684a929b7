"""gafext's command line under Accelerate's FSDP 2 on CPUs: Accelerate takes it up on GPUs alone, PyTorch on both."""

import sys

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gafext.cli import main
from gafext.training import run


class Sharded(Accelerator):
    version = 2

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=self.version)
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP

    def prepare(self, *parts):
        """Say how many units there are: all blocks, and what is around them."""
        prepared = super().prepare(*parts)
        modules = [module for part in prepared if isinstance(part, nn.Module) for module in part.modules()]
        self.print(f"{sum(isinstance(module, FSDPModule) for module in modules)} units")
        return prepared


if __name__ == "__main__":
    run.Accelerator = Sharded
    sys.exit(main(sys.argv[1:]))
