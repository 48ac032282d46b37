"""What casts and norm restorations leave of a direction: plain rounding beside rounding that carries its remainder.

uv run python bench/casts.py MODEL     matrices of a bfloat16 checkpoint of the Llama layout, a random direction each

For each storage type the matrix is first stored in that type (FP8 with blocks of 128 x 128, MXFP4, and on every sixth
layer the block types of GGUF, by llama.cpp's encoder), then projected; a plain cast to those is that encoder again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.codecs import Array, Codec, Mxfp4, Plain, Scaled
from abliterate.checkpoint.ggml_blocks import LAYOUTS, Blocks
from abliterate.checkpoint.matrix import Matrix
from abliterate.checkpoint.storage import matrices
from abliterate.edit.plan import plan_edit
from abliterate.edit.projection import Removal, orthonormal, project_columns
from abliterate.edit.requantise import move_columns

#: In every how many layers block types are measured as well, as some encoders take seconds; numbers in their blocks.
EVERY, WIDEST = 6, 256


def codecs(w: Array) -> dict[str, Codec]:
    """Codecs that suit a matrix."""
    rows, columns = (-(-n // 128) for n in w.shape)
    blocks = np.zeros((rows * 128, columns * 128), np.float32)
    blocks[: w.shape[0], : w.shape[1]] = np.abs(w)
    largest = blocks.reshape(rows, 128, columns, 128).max((1, 3))
    of_32 = np.abs(w).reshape(len(w), -1, 32).max(2)
    exponents = np.clip(np.floor(np.log2(np.maximum(of_32, 1e-30))) - 2 + 127, 0, 254).astype(np.uint8)
    return {
        "BF16": Plain("BF16"),
        "F16": Plain("F16"),
        "FP8 E4M3": Scaled("F8_E4M3", largest / np.float32(448), (128, 128)),
        "FP8 E5M2": Scaled("F8_E5M2", largest / np.float32(57344), (128, 128)),
        "MXFP4": Mxfp4(exponents),
    }


def measure(w: Array, codec: Codec, d: Array, folder: Path) -> tuple[float, float, float]:
    """Leak of a plain cast, leak of ours, and our rounding error relative to the plain cast's."""
    rows = np.arange(len(w))
    stored = w.astype(np.float32)
    (folder / "a").write_bytes(codec.round(stored, rows).tobytes())
    (folder / "b").write_bytes(bytes((folder / "a").stat().st_size))
    exact = stored - d @ (d.T @ stored)
    plain = exact.copy()
    codec.round(plain, rows)
    matrix = Matrix("w", "a", 0, *w.shape, codec)
    with (folder / "a").open("rb") as a, (folder / "b").open("r+b") as b:
        project = move_columns if isinstance(codec, Blocks) else project_columns
        project(matrix, a.fileno(), b.fileno(), Removal(d))
        ours = matrix.values(b.fileno(), rows)
    before = np.linalg.norm(d.T @ stored)
    wide = d.T.astype(np.float64)
    return (
        float(np.linalg.norm(wide @ plain) / before),
        float(np.linalg.norm(wide @ ours) / before),
        float(np.linalg.norm(ours - exact) / np.linalg.norm(plain - exact)),
    )


def norms(w: Array, d: Array) -> tuple[float, float]:
    """Leak after the norms of columns, and after those of rows, are brought back."""
    w = w.astype(np.float64)
    plain = w - d @ (d.T @ w)
    columns = plain * (np.linalg.norm(w, axis=0) / np.linalg.norm(plain, axis=0))
    rows = plain * (np.linalg.norm(w, axis=1) / np.linalg.norm(plain, axis=1))[:, None]
    return tuple(float(np.linalg.norm(d.T @ x) / np.linalg.norm(d.T @ w)) for x in (columns, rows))  # type: ignore[return-value]


def main() -> None:
    """Every MLP and attention output matrix of the model; medians with least and most."""
    checkpoint = open_checkpoint(Path(sys.argv[1]))
    found: dict[str, list[tuple[float, ...]]] = {}
    with tempfile.TemporaryDirectory() as name:
        writers = [w for w in plan_edit(checkpoint).writers if w.layer is not None and w.tensor.endswith("weight")]
        for i, writer in enumerate(writers):
            info = checkpoint.tensors[writer.tensor]
            matrix = next(iter(matrices(checkpoint, info, writer.axis)))
            with (checkpoint.path / info.file).open("rb") as file:
                w = matrix.values(file.fileno(), np.arange(matrix.rows))
            d = orthonormal(np.random.default_rng(i).normal(size=len(w)).astype(np.float32))
            fits = w.shape[1] % WIDEST == 0 and writer.layer is not None and not writer.layer % EVERY
            blocks = {f"GGUF {dtype}": Blocks(dtype) for dtype in LAYOUTS if fits}
            for kind, codec in (codecs(w) | blocks).items():
                found.setdefault(kind, []).append(measure(w, codec, d, Path(name)))
            found.setdefault("norms", []).append(norms(w, d.astype(np.float64)))
    print(f"{len(writers)} matrices of {checkpoint.path.name}\n")
    print("| type | leak, plain cast | leak, remainder carried | rounding error, × plain cast |")
    print("| --- | --- | --- | --- |")
    for kind, rows in found.items():
        if kind != "norms":
            print(
                f"| {kind} | "
                + " | ".join(_spread([r[i] for r in rows], "{:.1e}" if i < 2 else "{:.2f}") for i in range(3))
                + " |"
            )
    columns, by_rows = ([r[i] for r in found["norms"]] for i in range(2))
    print(f"\nnorms of columns kept: leak {_spread(columns, '{:.1e}')}; norms of rows: {_spread(by_rows, '{:.1e}')}")


def _spread(values: list[float], how: str) -> str:
    middle, least, most = (how.format(x) for x in (np.median(values), min(values), max(values)))
    return f"{middle} [{least}, {most}]"


if __name__ == "__main__":
    main()
