"""DeepSpeed ZeRO-Infinity as a side of a comparison: stage 3, parameters and optimizer state on NVMe, one CPU process.

Runs in the peer's own virtual environment (see `deepspeed_nvme.py`), from the same model, tokens, clipping and AdamW.
bf16 weights, fp32 masters, moments and gradient sums, as on the other sides.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from allocator import keep_large_blocks
from turns import serve
from workload import BETAS, CLIP_NORM, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Workload, loss_fn

MIB = 1 << 20


def configuration(workload: Workload, arguments: argparse.Namespace) -> dict:
    """DeepSpeed's own configuration."""
    rows, _ = workload.shape
    largest = workload.width * max(workload.width * 11 // 4, 4096)
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": workload.micro_batches,
        "gradient_clipping": CLIP_NORM,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": arguments.bucket_elements,
            "sub_group_size": arguments.sub_group_elements,
            "stage3_prefetch_bucket_size": arguments.prefetch_elements,
            "stage3_max_live_parameters": arguments.live_elements,
            "stage3_max_reuse_distance": arguments.live_elements,
            "stage3_param_persistence_threshold": arguments.persist_elements,
            "offload_param": {
                "device": "nvme",
                "nvme_path": arguments.folder,
                "buffer_count": arguments.parameter_buffers,
                "buffer_size": largest,
                "max_in_cpu": 0,
                "pin_memory": arguments.pin,
            },
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": arguments.folder,
                "buffer_count": arguments.optimizer_buffers,
                "pin_memory": arguments.pin,
                "pipeline_read": arguments.pipeline,
                "pipeline_write": arguments.pipeline,
            },
        },
        "aio": {
            "block_size": arguments.aio_block_bytes,
            "queue_depth": arguments.aio_queue_depth,
            "intra_op_parallelism": arguments.aio_threads,
            "single_submit": False,
            "overlap_events": True,
        },
    }


class DeepSpeedSide:
    """One engine of DeepSpeed; a step is `micro_batches` forward and backward passes, then its optimizer."""

    def __init__(self, workload: Workload, arguments: argparse.Namespace) -> None:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(arguments.port),
            DS_ACCELERATOR="cpu",
        )  # fmt: skip
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        deepspeed.init_distributed(dist_backend="gloo")
        settings = configuration(workload, arguments)
        with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
            model = workload.build()
        model.train()
        if arguments.activations == "recompute":
            model.gradient_checkpointing_enable({"use_reentrant": arguments.reentrant, "preserve_rng_state": False})
        elif arguments.activations == "deepspeed":
            deepspeed.checkpointing.configure(None, partition_activations=False, contiguous_checkpointing=False)
            for layer in model.model.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = deepspeed.checkpointing.checkpoint
        self.workload, self.folder, self.number = workload, arguments.folder, 0
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if len(p.ds_shape) > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if len(p.ds_shape) == 1], "weight_decay": 0.0},
        ]
        optimizer = DeepSpeedCPUAdam(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, adamw_mode=True)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        torch.set_num_threads(arguments.threads)

    def step(self) -> dict:
        self.number += 1
        total = 0.0
        for micro_batch in self.workload.batches(self.number):
            loss = loss_fn(self.engine, micro_batch)
            self.engine.backward(loss)
            self.engine.step()
            total += float(loss.detach()) / self.workload.micro_batches
        return {"loss": total}

    def close(self) -> dict:
        shutil.rmtree(self.folder, ignore_errors=True)
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Workload.add_arguments(parser)
    parser.add_argument("--activations", choices=["keep", "recompute", "deepspeed"], default="keep")
    parser.add_argument("--reentrant", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--allocator", choices=["reuse", "glibc"], default="glibc")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--port", type=int, default=29517)
    parser.add_argument("--parameter-buffers", type=int, default=8)
    parser.add_argument("--optimizer-buffers", type=int, default=8, help="each as large as a sub-group, in fp32")
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--pipeline", action="store_true")
    parser.add_argument("--bucket-elements", type=int, default=50_000_000)
    parser.add_argument("--sub-group-elements", type=int, default=50_000_000)
    parser.add_argument("--prefetch-elements", type=int, default=15_000_000)
    parser.add_argument("--live-elements", type=int, default=30_000_000)
    parser.add_argument("--persist-elements", type=int, default=10_000)
    parser.add_argument("--aio-block-bytes", type=int, default=1 * MIB)
    parser.add_argument("--aio-queue-depth", type=int, default=16)
    parser.add_argument("--aio-threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.allocator == "reuse":
        keep_large_blocks()
    workload = Workload.of(arguments)
    serve(lambda: DeepSpeedSide(workload, arguments))


if __name__ == "__main__":
    main()
