"""Find where a model's parameters lie in the files of a checkpoint: which tensors, on which axis.

Owns the trace through transformers' own saving and loading, which rename, stack, split and transpose: a twin's
files are filled with numbers that name their place, loaded, and read off in the parameters.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from abliterate.architecture.probe import Writer
from abliterate.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a checkpoint that holds a parameter or part of one; `axis` is the parameter's residual axis there."""

    name: str
    axis: int


@dataclass(frozen=True)
class Trace:
    """The names of all tensors in a twin's files, and each parameter as `(tensor index, place in it)` per element."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tensor: dict[str, torch.Tensor]
    place: dict[str, torch.Tensor]

    def writer(self, writer: Writer) -> list[FileTensor]:
        """The tensors in which a writer lies, whole, in file order.

        Raises:
            UnsupportedError: a tensor holds other things too, or the residual axis is no axis of it.
        """
        which, place = self.tensor[writer.parameter], self.place[writer.parameter]
        coordinate = torch.arange(which.shape[writer.axis]).reshape(
            [-1 if i == writer.axis else 1 for i in range(which.ndim)]
        )
        found = []
        for index in sorted({int(i) for i in which.unique()}):
            if index < 0:
                raise UnsupportedError(f"parameter '{writer.parameter}' is not stored as it is used")
            here = which == index
            coordinates = np.unravel_index(place[here].numpy(), self.shapes[index])
            wanted = coordinate.expand_as(which)[here].numpy()
            axes = [a for a, c in enumerate(coordinates) if np.array_equal(c, wanted)]
            if int(here.sum()) != int(np.prod(self.shapes[index])) or len(axes) != 1:
                raise UnsupportedError(
                    f"tensor '{self.names[index]}' holds '{writer.parameter}' and more, or in an order of its own"
                )
            found.append(FileTensor(self.names[index], axes[0]))
        return found

    def tensor_of(self, parameter: str) -> str | None:
        """The tensor that a parameter is read from, or None where it is not one."""
        which = self.tensor[parameter].unique()
        return self.names[int(which[0])] if len(which) == 1 and which[0] >= 0 else None

    def same(self, parameter: str) -> str:
        """The one tensor that a parameter is, element by element.

        Raises:
            UnsupportedError: it is not one.
        """
        which, place = self.tensor[parameter].flatten(), self.place[parameter].flatten()
        if len(which.unique()) != 1 or which[0] < 0 or not torch.equal(place, torch.arange(len(place))):
            raise UnsupportedError(f"parameter '{parameter}' is not stored as one tensor")
        return self.names[int(which[0])]


def trace(model: PreTrainedModel) -> Trace:
    """Where every parameter of a twin lies in the files that transformers saves of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        stored = {file: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
        names = tuple(n for tensors in stored.values() for n in tensors)
        shapes = {n: tuple(t.shape) for tensors in stored.values() for n, t in tensors.items()}

        def loaded(fill: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for file, tensors in stored.items():
                save_file({n: fill[n] for n in tensors}, file, {"format": "pt"})
            again = type(model).from_pretrained(folder, dtype=torch.float64, local_files_only=True)
            return {n: _whole(p.data) for n, p in again.named_parameters(remove_duplicate=False)}

        # One load says which tensor an element came from, the other which place in it.
        numbered = {n: torch.full(shapes[n], float(i), dtype=torch.float64) for i, n in enumerate(names)}
        places = {
            n: torch.arange(max(1, int(np.prod(shapes[n]))), dtype=torch.float64).reshape(shapes[n]) for n in names
        }
        return Trace(names, tuple(shapes[n] for n in names), loaded(numbered), loaded(places))


def _whole(values: torch.Tensor) -> torch.Tensor:
    """Values as whole numbers; −1 where loading computed something else from them."""
    rounded = values.round()
    return torch.where(rounded == values, rounded, -1.0).long()
