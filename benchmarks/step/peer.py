"""A worker of a peer: a Hugging Face model in a DeepSpeed engine, or with Hugging Face's own expert parallelism.

`python -m benchmarks.step.peer SETTING`, in the environment that a launcher sets. It imports nothing of this package's
`dist_moe`. The models:

- autoep: DeepSpeed's AutoEP replaces the MoE blocks.
- hf: the blocks of transformers with grouped matmuls, each rank with all experts.
- classic: the blocks are DeepSpeed's MoE layer, which drops tokens over the capacity.
- hf-native: the expert parallelism of transformers with all-to-all, over FSDP and without DeepSpeed; in bf16 with fp32
  parameters, as DeepSpeed's are.
"""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.step.gate import Gate, StepFacts
from benchmarks.step.setting import BETAS, GRADIENT_CLIPPING, LEARNING_RATE, WEIGHT_DECAY, ZERO_STAGE, PeerSetting, Text

TrainStep = Callable[[Any, Any, Any], Any]
"""Tokens, targets and positions, int64 [B, S] -> the mean loss, after the update."""


def main() -> None:
    """Train until the benchmark closes the connection."""
    setting, gate = PeerSetting.read(Path(sys.argv[1])), Gate()
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, step = start_native(setting) if setting.program == "hf-native" else start_engine(setting)
    loads, text = watch_loads(model), Text(Path(setting.text))
    world_size = int(os.environ["WORLD_SIZE"])
    for number in itertools.count():
        columns = text.rows((number * world_size + gate.rank) * setting.sequences, setting.sequences)
        tokens_BS, targets_BS, positions_BS = map(torch.from_numpy, columns)
        loss = step(tokens_BS, targets_BS, positions_BS)

        def facts(loss: Any = loss, targets_BS: Any = targets_BS) -> StepFacts:
            labels = int((targets_BS >= 0).sum())
            return StepFacts(float(loss) * labels, labels, loads())

        gate.pass_step(facts)


def start_engine(setting: PeerSetting) -> tuple[Any, TrainStep]:
    """Return a model in a DeepSpeed engine, and its training step."""
    import deepspeed

    # Its first collective would compile an operator for inference on CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = make_model(setting)
    parameters: Any = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if setting.program == "classic":
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split_groups

        put_classic_blocks(model, setting)
        parameters = split_groups({"params": list(model.parameters()), "name": "all"})
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, config=engine_config(setting), dist_init_required=False
    )

    def step(tokens_BS: Any, targets_BS: Any, positions_BS: Any) -> Any:
        loss = loss_of(engine, tokens_BS, targets_BS, positions_BS)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return engine.module, step


def engine_config(setting: PeerSetting) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    optimizer = {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "torch_adam": True}
    if setting.fused:
        optimizer["fused"] = True
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": setting.sequences,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "gradient_clipping": GRADIENT_CLIPPING,
        "zero_optimization": {"stage": ZERO_STAGE},
        "bf16": {"enabled": setting.bf16},
        "steps_per_print": 2**31,
    }
    if setting.program == "autoep":
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": setting.expert_parallel,
            "preset_model": setting.architecture,
        }
    return config


def make_model(setting: PeerSetting) -> Any:
    """Return the model with random values, in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(setting.architecture, **setting.model)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="grouped_mm")
    return model.train()


def loss_of(model: Any, tokens_BS: Any, targets_BS: Any, positions_BS: Any) -> Any:
    """Return the loss as transformers computes it; documents are told apart by their positions."""
    output = model(
        input_ids=tokens_BS,
        position_ids=positions_BS,
        labels=targets_BS,
        shift_labels=targets_BS,
        use_cache=False,
    )
    return output.loss


def put_classic_blocks(model: Any, setting: PeerSetting) -> None:
    """Replace the MoE blocks of a Qwen3-MoE model by DeepSpeed's MoE layer with experts of the same size."""
    import torch.nn.functional as F
    from deepspeed.moe.layer import MoE
    from torch import nn

    hidden, width = setting.model["hidden_size"], setting.model["moe_intermediate_size"]

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Linear(hidden, 2 * width, bias=False), nn.Linear(width, hidden, bias=False)

        def forward(self, x: Any) -> Any:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoE(
                hidden,
                Expert(),
                num_experts=setting.model["num_experts"],
                ep_size=setting.expert_parallel,
                k=setting.model["num_experts_per_tok"],
                min_capacity=0,
            )

        def forward(self, hidden_BSD: Any) -> Any:
            return self.moe(hidden_BSD)[0]

    for layer in model.model.layers:
        layer.mlp = Block()


def start_native(setting: PeerSetting) -> tuple[Any, TrainStep]:
    """Return a model with the expert parallelism of transformers, and its training step."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    folder = Path(setting.scratch) / "model"
    if dist.get_rank() == 0:
        make_model(setting).save_pretrained(folder)
    dist.barrier()
    sizes: dict[str, Any] = {"fsdp_size": dist.get_world_size(), "ep_size": setting.expert_parallel}
    plan = DistributedConfig(**sizes, fsdp_mixed_precision=setting.bf16)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=plan, experts_implementation="grouped_mm"
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=False, fused=setting.fused
    )

    def step(tokens_BS: Any, targets_BS: Any, positions_BS: Any) -> Any:
        loss = loss_of(model, tokens_BS, targets_BS, positions_BS)
        loss.backward()
        clip_gradients(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def clip_gradients(parameters: list[Any]) -> None:
    """Clip by the norm over all parameters; torch's own function takes those of one device mesh only."""
    import torch
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    by_mesh: dict[Any, list[Any]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [get_total_norm([part.grad for part in parts], foreach=False) for parts in by_mesh.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole))
    for parts in by_mesh.values():
        clip_grads_with_norm_(parts, GRADIENT_CLIPPING, total, foreach=False)


def watch_loads(model: Any) -> Callable[[], list[list[int]]]:
    """Return a function that counts the assignments of each expert in the last forward, for each MoE layer.

    During a step only references are kept. A router gives the ids of the experts [T, K] among its outputs, and
    DeepSpeed's MoE layer the counts [E].
    """
    import torch

    last: dict[str, tuple[Any, int]] = {}

    def keep(name: str, experts: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            whole = [item for item in output if torch.is_tensor(item) and not item.is_floating_point()]
            last[name] = (whole[0].detach(), experts)

        return hook

    for name, module in model.named_modules():
        is_router = type(module).__name__.endswith("Router")
        if is_router or (type(module).__name__ == "MoE" and type(module).__module__ == "deepspeed.moe.layer"):
            module.register_forward_hook(keep(name, module.num_experts))

    def loads() -> list[list[int]]:
        found = last.values()
        counts = [ids if ids.dim() == 1 else torch.bincount(ids.flatten(), minlength=experts) for ids, experts in found]
        return [count.tolist() for count in counts]

    return loads


if __name__ == "__main__":
    main()
