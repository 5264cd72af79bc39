"""What an interrupted calibration goes on from: sums and probes, in one file that is never half written."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

SAVE_EVERY_S = 20.0
"""The sums of a large model are a gigabyte: not after every window."""


@dataclass
class StateFile:
    """The state of a calibration at `path`. `belongs_to` says of which: model, text and settings, plain JSON values."""

    path: Path
    belongs_to: dict[str, Any]
    _saved_at: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Tensor] | None:
        """The tensors of `save`, None where there is no file. Raises `ValueError` when it is of another calibration,
        naming the difference, or damaged."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None
        try:
            with safe_open(str(self.path), framework="pt") as file:
                found = json.loads((file.metadata() or {})["kvferry_calibration"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path} is not the state of a calibration, or damaged: begin anew (--fresh)"
            ) from error
        # As JSON gives it back: tuples are lists there.
        for name, own in json.loads(json.dumps(self.belongs_to)).items():
            if found.get(name) != own:
                raise ValueError(
                    f"{self.path} is the state of another calibration: {name} was {found.get(name)}, and is {own} now: "
                    "begin anew (--fresh), or give another --out"
                )
        return tensors

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Replace the file."""
        from safetensors.torch import save_file

        beside = self.path.with_name(self.path.name + ".new")
        save_file(tensors, str(beside), metadata={"kvferry_calibration": json.dumps(self.belongs_to)})
        os.replace(beside, self.path)
        self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether `SAVE_EVERY_S` have passed since the last `save`."""
        return time.monotonic() - self._saved_at >= SAVE_EVERY_S

    def remove(self) -> None:
        """Once nothing is left to go on with."""
        self.path.unlink(missing_ok=True)
