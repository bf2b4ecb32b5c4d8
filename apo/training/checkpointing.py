"""What a trainer writes: whole checkpoints, safetensors only, and uploads of the model's files alone."""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy, rotate_checkpoints
from transformers.utils.hub import PushInProgress, hf_api
from trl.trainer.dpo_trainer import DPOTrainer

from apo.models.decomposed_lora import write_plain
from apo.monitoring.failures import (
    NonFiniteLossCheck,
    TrainingStopped,
    check_weights_finite,
    checkpoint_hint,
    stop_on_write_error,
)
from apo.monitoring.throughput import Meter
from apo.run_dir import checkpoints
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError, one_line

if TYPE_CHECKING:
    from clair.inference.generation.soft_prompt import SoftPrompt

_LOG = logging.getLogger(__name__)
_UPLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "*.png")
_NOT_UPLOADED = ("*/*", ".*", "trainer_state.json", checkpoints.MARKER)
"""Patterns of the files of a folder that go to the hub, and of the exceptions among them."""


class CheckpointTrainer(DPOTrainer):
    """The saving half of the trainer: whole checkpoints, and uploads of the model's files only."""

    args: APOConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # wider in TRL
    processing_class: PreTrainedTokenizerBase  # pyright: ignore[reportIncompatibleVariableOverride]  # wider in TRL
    model: Any

    meter: Meter
    _losses: NonFiniteLossCheck

    verified_checkpoint: Path | None = None
    """A checkpoint whose files have just been hashed: `train` does not hash them again."""
    _is_decomposed = False
    """True if the adapter began as a part of the weights (decomposed_lora.py)."""
    soft_prompt: SoftPrompt | None = None
    """In files of its own: other programs read the model's without it."""
    _saved_use_cache: bool
    """`use_cache` of the saved config; training turns it off."""

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None  # TrainingArguments fills it in
        return Path(self.args.output_dir)

    # Resuming

    def _resolve_checkpoint(self, checkpoint: str | bool | None) -> str | None:
        """The folder to resume from: for True the newest whole checkpoint of `output_dir`, otherwise `checkpoint`.

        Raises UserError if there is none, or if the one at `checkpoint` is damaged.
        """
        if checkpoint is True:
            search = checkpoints.find_newest_checkpoint(self._output_dir)
            for note in search.notes:
                _LOG.warning(note)
            if search.newest is None:
                raise UserError(f"{self._output_dir} holds no whole checkpoint; leave resume_from_checkpoint out")
            return str(search.newest)
        if not checkpoint or Path(checkpoint) == self.verified_checkpoint:
            return checkpoint or None
        has_marker = (Path(checkpoint) / checkpoints.MARKER).exists()  # not in checkpoints of other trainers
        if has_marker and (damage := checkpoints.find_damage(Path(checkpoint))):
            raise UserError(f"{checkpoint} is damaged: {damage}; resume from another checkpoint")
        return checkpoint

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights. Raises `failures.TrainingStopped` if they have changed on disk."""
        assert self.state.best_model_checkpoint is not None  # TRL calls this for a best checkpoint only
        best = Path(self.state.best_model_checkpoint)
        if damage := checkpoints.find_damage(best):
            raise TrainingStopped(f"the best model, {best}, is damaged: {damage}; {checkpoint_hint(self)}")
        super()._load_best_model()
        if self.soft_prompt is not None:
            self.soft_prompt.restore(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights, and the soft prompt beside them."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.soft_prompt is not None:
            self.soft_prompt.restore(Path(resume_from_checkpoint))

    # Saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of finite weights under `.unfinished/`, then move it into place (checkpoints.py).

        Its time does not count in pairs per second.
        """
        self._losses.flush(self)
        check_weights_finite(self)
        out = self.args.output_dir
        with self.meter.pause():
            with stop_on_write_error(self, "the checkpoint"):
                try:
                    self.args.output_dir = str(self._output_dir / checkpoints.UNFINISHED)
                    super()._save_checkpoint(model, trial)
                finally:
                    self.args.output_dir = out
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                with stop_on_write_error(self, "the checkpoint"):
                    self._complete_checkpoint()
            self.accelerator.wait_for_everyone()

    def _complete_checkpoint(self) -> None:
        out = self._output_dir
        name = f"checkpoint-{self.state.global_step}"
        folder = out / checkpoints.UNFINISHED / name
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(out / name)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        checkpoints.complete_checkpoint(folder, out / name, resumable=not self.args.save_only_model)
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            self._upload(out / name, f"Training in progress, step {self.state.global_step}")
        rotate_checkpoints(str(out), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights as safetensors (or the trained adapter alone), config, generation config and tokenizer.

        No training_args.bin: it is a pickle that nothing reads.
        """
        if not self.args.should_save:
            return
        folder = output_dir or str(self._output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        adapters = {"selected_adapters": ["default"]} if is_peft_model(model) else {}
        if state_dict is not None:  # gathered from all processes, which repeats tied weights
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        if self.soft_prompt is not None:
            state_dict = {k: v for k, v in (state_dict or model.state_dict()).items() if "soft_prompt." not in k}
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.soft_prompt.save(Path(folder))
        training_use_cache, model.config.use_cache = model.config.use_cache, self._saved_use_cache
        with warnings.catch_warnings():  # PEFT warns that it saves embeddings that were resized, which is right
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`", UserWarning)
            warnings.filterwarnings("ignore", r"Adapter .*lora_B\.bias", UserWarning)  # a vector, which is right too
            model.save_pretrained(folder, state_dict=state_dict, **adapters)
        if self._is_decomposed:
            write_plain(model, Path(folder), state_dict)
        model.config.use_cache = training_use_cache
        self.processing_class.save_pretrained(folder)

    # Uploading

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the checkpoint is not in place yet, and TRL uploads everything in the run's folder."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload model, configs, tokenizer, card and metrics; no checkpoint, optimizer state or pickle.

        Returns the commit or, unless `blocking`, its future; None on processes other than rank 0.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token or self.args.hub_token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        upload = self._upload(self._output_dir, commit_message, token=token, revision=revision)
        return upload.result() if blocking else upload

    def _upload(
        self, folder: Path, message: str | None, token: str | None = None, revision: str | None = None
    ) -> Future[Any]:
        """Upload a model's files in the background, after earlier uploads. A failure is logged."""
        assert self.hub_model_id is not None  # set with `push_to_hub`, or just above
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        upload = hf_api().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=True,
            allow_patterns=list(_UPLOADED),
            ignore_patterns=list(_NOT_UPLOADED),
        )
        upload.add_done_callback(_log_failed_upload)
        self.push_in_progress = PushInProgress([upload])  # pyright: ignore[reportArgumentType]  # its annotation is wrong
        return upload

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: TRL's card says DPO. `apo train` writes its own at the end."""

    def _send_telemetry(self) -> None:
        """Do nothing: no data about the training leaves the machine."""


def _log_failed_upload(upload: Future[Any]) -> None:
    if error := upload.exception():
        _LOG.warning("upload to the hub failed: %s", one_line(error))
