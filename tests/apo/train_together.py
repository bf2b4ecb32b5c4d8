"""Run by torchrun, as `train_together.py OUT WAY`: trains every case below and writes the metrics of each step.

The way is "ddp" (or one process), "fsdp" (accelerate's FSDP2, on CPUs that accelerate takes for GPUs), "zero2" or
"zero3" (DeepSpeed, likewise, as accelerate's launcher asked for it) or "raw", a loop of its own over torch's
`fully_shard` that is given the pairs of each step by an earlier run, as `raw OTHER_OUT`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset

from apo.distributed.deepspeed import unsharded_loading
from tests.apo.conftest import make_model, make_pairs, make_tokenizer
from tests.apo.deepspeed_on_cpus import let_cpus_share_out
from tests.apo.training.families import tiny
from tests.apo.training.unpaired_rows import make_rows

STEPS = 20
SIZE = 8
"""Pairs a step. 22 pairs make steps of 8, 8 and 6."""
CASES = {
    "llama": {},
    "tied": {"family": "qwen3", "objective": {"dpo": 1.0, "sft": 0.1}, "pack_tokens": 60, "checkpointing": True},
    "lora": {"family": "mistral, window of 12", "lora": True, "objective": "apo_down", "weights": "weight"},
    "kto": {"lora": True, "objective": "kto"},
    "online": {"objective": "kto"},
    "unpaired": {
        "family": "gemma2, soft caps, window of 12", "lora": True, "objective": "kto", "unpaired": True,
    },
    "weights": {"weights": "weight", "shared_prefix": False},
    "windows": {"family": "gemma2, soft caps, window of 12"},
}  # fmt: skip
OF = {"ddp": tuple(CASES), "fsdp": tuple(name for name in CASES if name != "online"),
      "raw": ("llama", "tied", "windows"), "zero2": tuple(CASES), "zero3": tuple(CASES)}  # fmt: skip
"""Cases by backend. Under FSDP a second whole model beside a sharded one is refused."""
LEARNING_RATE = 1e-4
UNSHARDED = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
"""Limits of what ZeRO-3 leaves unsharded after use: their defaults would leave all of so small a model."""


def model_of(case):
    torch.manual_seed(0)
    with unsharded_loading():
        return tiny(case["family"]) if "family" in case else make_model()


def rows_of(case):
    if case.get("unpaired"):
        return make_rows(22)
    return [{**pair, "weight": 0.5 + index % 3} for index, pair in enumerate(make_pairs(22))]


def let_cpus_shard():
    """Make accelerate take its CPUs for GPUs: it leaves FSDP out on CPUs, although torch allows it."""
    import accelerate.state
    from accelerate.utils import DistributedType

    plain = accelerate.state.PartialState.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = init


def train(name, out, backend):
    """The trainer's run of a case: what it logs, the prompts of each step in the order of one process, the model."""
    from accelerate.utils import gather_object

    from apo.packing.batch import unstack
    from apo.training import reference
    from apo.training.trainer import APOTrainer
    from apo.training.trainer_config import APOConfig

    reference.CHUNK = 4
    case = CASES[name]
    count = int(os.environ.get("WORLD_SIZE", "1"))
    step_pairs, passes = [], []

    class Watched(APOTrainer):
        def _split_into_passes(self, inputs):
            chunks = super()._split_into_passes(inputs)
            passes.append(sum(not chunk.dummy for chunk in chunks))
            return chunks

        def get_batch_samples(self, *args):
            if backend == "zero3":  # between steps nothing is here
                assert all(weight.numel() == 0 for weight in self.model.parameters())
            batches, weight = super().get_batch_samples(*args)
            local_examples = [[] if batch.dummy else unstack(batch.stacked) for batch in batches]
            everybody = gather_object([local_examples])
            step_pairs.append(
                [example for nth in zip(*everybody, strict=True) for examples in nth for example in examples]
            )
            return batches, weight

    args = APOConfig(
        output_dir=str(out / "run"), max_steps=STEPS, logging_steps=1, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=SIZE // 2 // count, gradient_accumulation_steps=2,
        learning_rate=LEARNING_RATE * (10 if case.get("objective") == "kto" else 1),  # so that there is a divergence
        objective=case.get("objective", "apo_zero"), weights=case.get("weights"), pack_tokens=case.get("pack_tokens"),
        shared_prefix=case.get("shared_prefix", True), precompute_ref_log_probs=case.get("objective") != "kto",
        fsdp=backend == "fsdp", gradient_checkpointing=case.get("checkpointing", False),
    )  # fmt: skip
    if backend == "zero3":
        args.deepspeed_plugin.deepspeed_config["zero_optimization"] |= dict.fromkeys(UNSHARDED, 0)
    lora = None
    if case.get("lora"):
        from peft import LoraConfig

        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Watched(
        model_of(case), args=args, train_dataset=Dataset.from_list(rows_of(case)), processing_class=make_tokenizer(),
        peft_config=lora,
    )  # fmt: skip
    assert trainer.is_fsdp_enabled == (backend == "fsdp")
    assert trainer.is_deepspeed_enabled == backend.startswith("zero")
    assert trainer.is_packed == case.get("shared_prefix", True), trainer.notes
    trainer.train()
    trainer.save_model(str(out / name))
    passes = gather_object([passes])
    if trainer.is_world_process_zero():
        rows = [row for row in trainer.state.log_history if "grad_norm" in row]
        return {
            "rows": rows,
            "pairs": step_pairs,
            "passes": passes,
            "computed": trainer.reference_computed.get("train"),
        }


def shard(name, expected):
    """The same steps by hand: `fully_shard` per block on a mesh of CPUs, packed rows, torch's AdamW."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from apo.losses.mixture import resolve_mixture
    from apo.packing.layout import pack_pairs
    from apo.packing.packed_model import enable_packing, packed_logps

    rank, count = dist.get_rank(), dist.get_world_size()
    model, anchor = model_of(CASES[name]), model_of(CASES[name])
    for network in (model, anchor):
        enable_packing(network)
    mesh = init_device_mesh("cpu", (count,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    objective = resolve_mixture(CASES[name].get("objective", "apo_zero"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
    rows = []
    for row, examples in zip(expected["rows"], expected["pairs"], strict=True):
        packed = pack_pairs(examples[rank::count])
        with torch.no_grad():
            anchors = packed_logps(anchor, packed)
        logps = packed_logps(model, packed)
        losses = objective.losses(logps, (anchors.chosen, anchors.rejected), beta=0.1)
        (losses.sum() * count / len(examples)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        for group in optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
        sums = torch.stack([tensor.detach().double().sum() for tensor in (losses, logps.chosen, logps.rejected)])
        dist.all_reduce(sums)
        means = (sums / len(examples)).tolist()
        names = ("loss", "logps/chosen", "logps/rejected")
        rows.append({**dict(zip(names, means, strict=True)), "grad_norm": float(norm)})
    return {"rows": rows}, {key: value.full_tensor() for key, value in model.state_dict().items()}


def main():
    out, backend, *arguments = sys.argv[1:]
    out = Path(out)
    results = {}
    if backend == "raw":
        from safetensors.torch import save_file

        dist.init_process_group("gloo")
        steps = json.loads((Path(arguments[0]) / "steps.json").read_text())
        for name in OF[backend]:
            results[name], weights = shard(name, steps[name])
            if dist.get_rank() == 0:
                (out / name).mkdir(parents=True)
                weights = {key: value.clone().contiguous() for key, value in weights.items()}
                save_file(weights, out / name / "model.safetensors")
    else:
        if backend == "fsdp":
            let_cpus_shard()
        elif backend.startswith("zero"):
            let_cpus_share_out()
        for name in OF[backend]:
            results[name] = train(name, out, backend)
    if int(os.environ.get("RANK", "0")) == 0:
        out.mkdir(exist_ok=True)
        (out / "steps.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends while they run


if __name__ == "__main__":
    main()
