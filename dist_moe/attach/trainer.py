"""The balancer in transformers' Trainer, and in the trainers that are made of it, such as TRL's."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from dist_moe.attach.writer import LoadWriter
from dist_moe.errors import UserError
from dist_moe.probe.layers import has_distributed_experts, text_config
from dist_moe.text import counted

if TYPE_CHECKING:
    from dist_moe.attach.balancer import Balancer

AUXILIARY_KEYS = ("router_aux_loss_coef", "aux_loss_alpha")
"""Fields of configurations of transformers with the coefficient of an auxiliary loss."""
INTEGERS = "last_load"
"""The tensor of a layer's state that is int64; the others are fp32."""
logger = logging.getLogger("dist_moe")


class BalancerCallback(TrainerCallback, ExportableState):
    """Steps a balancer after each optimizer step, and keeps its state in trainer_state.json of each checkpoint.

    Args:
        balancer: The balancer.
        log_dir: A folder for TensorBoard; None for none.

    Raises:
        UserError: No balancer is given, as when the Trainer makes its callbacks again.
    """

    def __init__(self, balancer: "Balancer | None" = None, log_dir: str | Path | None = None) -> None:
        if balancer is None:
            raise UserError(
                "restore_callback_states_from_checkpoint=True makes callbacks again from their values; leave it out: "
                "the state of the balancer is restored from each checkpoint in any case"
            )
        self._balancer, self._warned = balancer, False
        self._log_dir = log_dir
        self._writer: LoadWriter | None = None

    def state(self) -> dict[str, Any]:
        """Return the state of the balancer as plain values, which fp32 survives exactly."""
        return {"args": {}, "attributes": {"balancer": _plain(self._balancer.state_dict())}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state of the checkpoint that the Trainer resumes from.

        Raises:
            UserError: The Trainer divides a batch among the devices of one process, whose counts would be lost.
        """
        if args.n_gpu > 1:
            raise UserError(
                f"the Trainer runs {args.n_gpu} GPUs in one process (torch.nn.DataParallel), whose replicas cannot be "
                "counted; start one process for each GPU: torchrun --nproc-per-node"
            )
        warn_of_auxiliary_loss(kwargs.get("model"))
        refuse_for_distributed_experts(kwargs.get("model"), args)
        if self._log_dir is not None and self._writer is None:
            self._writer = LoadWriter(self._log_dir, max(1, int(args.logging_steps)))
            self._balancer.listen(self._writer.write)
        if state.global_step > 0 and not self._restore(state):
            logger.warning(
                "training resumes at step %d from a checkpoint without a balancer, which starts without a state",
                state.global_step,
            )
            saved: Any = state.stateful_callbacks
            saved[type(self).__name__] = self.state()  # or the Trainer raises a KeyError when it saves

    def _restore(self, state: TrainerState) -> bool:
        saved: Any = state.stateful_callbacks
        stored = saved.get(type(self).__name__)
        stored = stored[0] if isinstance(stored, list) else stored
        if not stored or "balancer" not in stored["attributes"]:
            return False
        self._balancer.load_state_dict(_tensors(stored["attributes"]["balancer"]))
        return True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step, and leave the biases as they are if the optimizer step was skipped."""
        self._balancer.step(taken=not getattr(kwargs.get("optimizer"), "step_was_skipped", False))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add MaxVio and its floor to what is printed, and to the history of the Trainer."""
        load = self._balancer.load
        if logs is None or load is None or "loss" not in logs:
            return
        measures = {"max_vio": load.max_vio, "max_vio_floor": load.max_vio_floor}
        logs.update(measures)
        state.log_history[-1].update(measures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warn once that the saved model lacks the bias, where its architecture has no place for one."""
        lost = [layer.name for layer in self._balancer.layers if layer.bias == "ours"]
        if lost and not self._warned and state.is_world_process_zero:
            logger.warning(
                "the selection bias of %s is in trainer_state.json alone: %s has no place for it, so the saved model "
                "routes without it",
                counted(len(lost), "MoE layer"),
                type(kwargs.get("model")).__name__,
            )
        self._warned = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the biases of the best checkpoint if its weights were loaded, and close the files for TensorBoard."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore(TrainerState.load_from_json(str(Path(state.best_model_checkpoint) / TRAINER_STATE_NAME)))
        if self._writer is not None:
            self._writer.close()


def warn_of_auxiliary_loss(model: nn.Module | None) -> None:
    """Warn if a model adds its own auxiliary loss, which TRL switches on by default."""
    text = text_config(model)
    for key in AUXILIARY_KEYS:
        if getattr(text, "output_router_logits", False) and getattr(text, key, 0):
            logger.warning(
                "the model adds its own auxiliary loss (%s=%s), which the balancer makes unnecessary; set it to 0",
                key,
                getattr(text, key),
            )


def refuse_for_distributed_experts(model: nn.Module | None, args: TrainingArguments) -> None:
    """Refuse what the Trainer does on one rank alone, where ranks hold different experts (`dist_moe.parallelize`).

    Raises:
        UserError: It would clip by the norm of each rank's own experts, or save those of one rank.
    """
    if model is None or not has_distributed_experts(model):
        return
    if args.max_grad_norm:
        raise UserError(
            f"max_grad_norm={args.max_grad_norm} clips by the norm of each rank's own experts, after which the dense "
            "weights differ; set max_grad_norm=0"
        )
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
        raise UserError(
            f"save_strategy={args.save_strategy} saves the experts of one rank; set save_strategy='no', and call "
            "dist_moe.save_pretrained(model, folder) on all ranks"
        )


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, Mapping) else value.tolist() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    layers = {
        name: {
            key: torch.tensor(value, dtype=torch.int64 if key == INTEGERS else torch.float32)
            for key, value in layer.items()
        }
        for name, layer in state["layers"].items()
    }
    return {**state, "layers": layers}
