"""What a run has decided to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ftcore.config import PluginConfig, RunConfig
from ftcore.device import Device

if TYPE_CHECKING:
    from ftcore.specs.data import DataFormat
    from ftcore.specs.family import ModelFamily
    from ftcore.specs.kernels import Kernel
    from ftcore.specs.training import TrainerSpec

T = TypeVar("T", bound=PluginConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """One active plugin of a run."""

    name: str
    origin: str
    """Distribution and module, or file, or `python` for an object handed to `ftcore.run`."""
    hooks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that was decided about a run before any weight is read."""

    run: RunConfig
    family: ModelFamily
    format: DataFormat | None
    trainer: TrainerSpec | None
    kernels: tuple[Kernel, ...]
    device: Device
    output_dir: Path
    plugins: tuple[PluginInfo, ...]

    @property
    def dtype(self) -> str:
        """Name of the compute dtype: the config's, or the best one of the device. Imports torch for `auto`."""
        assert self.run.model is not None
        return self.device.dtype if self.run.model.dtype == "auto" else self.run.model.dtype

    def config(self, cls: type[T]) -> T:
        """The selected plugin's own Config, typed: `plan.config(GrpoConfig).num_generations`.

        Raises LookupError when no plugin with that Config is selected.
        """
        for kind in ("model", "quantizer", "adapter", "data", "trainer", "generator"):
            if isinstance(found := getattr(self.run, kind), cls):
                return found
        for kind in ("kernels", "reward", "export", "extra"):
            for found in getattr(self.run, kind).values():
                if isinstance(found, cls):
                    return found
        raise LookupError(f"no selected plugin has the Config {cls.__module__}.{cls.__qualname__}")
