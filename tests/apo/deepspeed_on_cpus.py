"""Run by a launcher, as `apo` is: the same command where DeepSpeed takes CPUs for the GPUs it wants."""

from __future__ import annotations

import os


def let_cpus_share_out():
    """Make accelerate take its CPUs for GPUs: it leaves DeepSpeed out on CPUs, although DeepSpeed runs there."""
    import accelerate.state
    from accelerate.utils import DistributedType

    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    state = accelerate.state.PartialState
    plain = state.__init__

    def init(self, cpu=False, **kwargs):
        plain(self, cpu=False, **kwargs)

    state.__init__ = init
    state._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    from apo.cli import main

    let_cpus_share_out()
    main()
