"""The trained model as exporters see it: loaded, or only as files, and merged a few rows at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.errors import Problem, Refused
from ftcore.specs import Plan

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ftcore.weights import Weights


class Checkpoint:
    """The trained model of a run. An exporter that needs its weights alone never has the model loaded.

    :param model: the model with its adapter, where it is loaded already.
    :param load: what loads it otherwise.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        model: nn.Module | None = None,
        load: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.plan = plan
        self._model = model
        self._load = load
        self._merged: Path | None = None
        self._stored: Weights | str | None = None

    @property
    def model(self) -> nn.Module:
        """The model with its adapter; loaded here where it is not yet."""
        if self._model is None:
            assert self._load is not None
            self._model = self._load()
        return self._model

    def base(self) -> PreTrainedModel:
        """The transformers model under the adapter."""
        model: Any = self.model
        getter = getattr(model, "get_base_model", None)
        found: PreTrainedModel = getter() if getter else model
        return found

    def weights(self, original: bool = False) -> Weights:
        """The merged weights under their published names, from the files where they tell all, else from the model.

        :param original: of a quantized base: the adapter is added to the weights as they were before they were
            quantized, not to those that it was trained over.

        Raises Refused when `original` is asked for and the files do not tell.
        """
        from ftcore.merge import model_weights

        if original and self.plan.run.quantizer is not None:
            found = self._stored_weights()
            if isinstance(found, str):
                fix = "merge onto the dequantized weights instead"
                raise Refused(Problem("export", f"cannot merge onto the original weights: {found}", fix))
            return found
        if self._model is None and self.plan.run.quantizer is None:
            found = self._stored_weights()
            if not isinstance(found, str):
                return found
        return model_weights(self.base())

    def config(self) -> PretrainedConfig:
        """The merged model's config: without a quantization, tied only where head and embedding are still one."""
        from ftcore.merge import model_config

        if self._from_files():
            config = self._stored_config()
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            return config
        return model_config(self.base())

    def generation(self) -> GenerationConfig | None:
        """The merged model's settings for generation; None where it has none, as encoders."""
        from transformers import GenerationConfig

        if self._from_files():
            folder = self._base_folder()
            found = (folder / "generation_config.json").is_file()
            return GenerationConfig.from_pretrained(folder) if found else None
        return getattr(self.base(), "generation_config", None)

    def merged(self) -> Path:
        """Folder with the merged 16-bit model, written once. Copy from it: it goes when the exporters are done."""
        from ftcore.merge import write_weights

        if self._merged is None:
            place = self.plan.output_dir / ".merged"
            weights, config = self.weights(), self.config()
            self._merged = write_weights(weights, config, self.tokenizer, place, generation=self.generation())
        return self._merged

    def discard(self) -> None:
        """Delete the merged folder; called once the exporters are done."""
        if self._merged is not None:
            shutil.rmtree(self._merged, ignore_errors=True)
            self._merged = None

    def _from_files(self) -> bool:
        return self._model is None and not isinstance(self._stored_weights(), str)

    def _adapter_folder(self) -> Path | None:
        """The adapter that was trained; None where all weights were, or where it is not saved.

        Of a model in memory `adapter.path` is the adapter that training began with, and what it trained lies in the
        run folder; of a finished run that is loaded again it is what was trained.
        """
        path = getattr(self.plan.run.adapter, "path", None)
        folder = Path(path) if path and self._load is not None else self.plan.output_dir / "trained"
        return folder if (folder / "adapter_config.json").is_file() else None

    def _base_folder(self) -> Path:
        """The base checkpoint on this machine; a hub id's safetensors are fetched where they are not there."""
        from ftcore import checkpoint

        assert self.plan.run.model is not None
        model = self.plan.run.model
        place = checkpoint.locate(model, self.plan.family)
        if Path(place).is_dir():
            return Path(place)
        return _fetched(place, model.revision)

    def _stored_config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        config: PretrainedConfig = AutoConfig.from_pretrained(self._base_folder(), trust_remote_code=False)
        return config

    def _stored_weights(self) -> Weights | str:
        """The merged weights by the files alone, or why they do not tell."""
        if self._stored is None:
            self._stored = self._from_base_and_adapter()
        return self._stored

    def _from_base_and_adapter(self) -> Weights | str:
        from ftcore.stored_merge import stored

        model, adapter = self.plan.run.model, self._adapter_folder()
        assert model is not None
        if model.new_tokens:
            return "tokens were added"
        if model.rope_scaling or model.max_length:
            return "its RoPE was changed"
        if adapter is None and getattr(self.plan.run.adapter, "name", "full") != "full":
            return "the adapter is not stored"
        config = self._stored_config()
        if (config.architectures or [""])[0] != self._class_name(config):
            return "the model has a head of its own"
        return stored(self._base_folder(), adapter, config)

    def _class_name(self, config: PretrainedConfig) -> str | None:
        """Name of the class that the run loads."""
        import transformers

        mapping = getattr(transformers, self.plan.family.auto_class)._model_mapping
        return mapping[type(config)].__name__ if type(config) in mapping else None


def _fetched(repo: str, revision: str | None) -> Path:
    """The files of a hub's repository that make a transformers checkpoint. Many hold the weights in another form too,
    such as `consolidated.safetensors` and `original/`, which would fill the disk."""
    from huggingface_hub import snapshot_download

    from ftcore.safetensors_file import INDEX, SINGLE, indexed_files

    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=["*.json"], ignore_patterns=["*/*"]))
    index = folder / INDEX
    weights = [file.name for file in indexed_files(index)] if index.is_file() else [SINGLE]
    # The folder has the commit's name: a branch may have moved on meanwhile.
    return Path(snapshot_download(repo, revision=folder.name, allow_patterns=weights))
