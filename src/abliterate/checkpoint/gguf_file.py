"""Read and check the header of one GGUF file, without its weights and without unpacking its vocabulary.

Owns the file format: keys and values, the table of tensors, alignment, the sizes of ggml's types.
Never reads tensor data, and never knows what kind of model a file holds.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import CheckpointError, UnsupportedError

#: ggml's types by number: name, elements in a block, bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
NUMBERS: dict[str, int] = {name: number for number, (name, _, _) in TYPES.items()}
#: The kinds of values: numbers by their code, then the three that are none by themselves.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9
MAGIC, VERSIONS = b"GGUF", (2, 3)
#: What a file without `general.alignment` is aligned to.
ALIGNMENT = 32
#: Of a header, in bytes; a vocabulary of 260 thousand tokens with its merges takes a twentieth of it.
_MOST_HEADER = 1 << 28
#: Bytes of one text, a template say; keys, and tensors; the largest models known have a hundredth of each.
_LONGEST_TEXT, _MOST_KEYS, _MOST_TENSORS = 1 << 24, 1 << 16, 1 << 17
#: What llama.cpp holds of a name and of a shape.
_LONGEST_NAME, _MOST_AXES, _MOST_ALIGNMENT = 63, 4, 1 << 20
_MOST_ELEMENTS = 1 << 63
_CHUNK = 1 << 20
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Listed:
    """An array that was passed over: `count` values of one `kind` in the `nbytes` from `offset` on."""

    kind: int
    count: int
    offset: int
    nbytes: int


Value = str | int | float | bool | Listed


@dataclass(frozen=True)
class GgufFile:
    """A file's header. `spans` holds the bytes `[start, stop)` of each key with its value, `data` where tensors begin.

    `tensors` have shapes in torch's order (the reverse of ggml's), ggml's names of types, and absolute offsets; they
    lie one behind another in the order of the table, each at a multiple of `alignment` from `data`.
    """

    path: Path
    version: int
    metadata: dict[str, Value]
    spans: dict[str, tuple[int, int]]
    tensors: dict[str, TensorInfo]
    alignment: int
    data: int
    size: int


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """The bytes of a tensor of ggml's type `dtype`; None where its rows are no whole blocks, or beyond 64 bits."""
    _, block, nbytes = TYPES[NUMBERS[dtype]]
    elements = 1
    for size in shape:
        elements *= size
        if max(elements, size) >= _MOST_ELEMENTS:
            return None
    return None if shape and shape[-1] % block else math.ceil(elements / block) * nbytes


def read_gguf(path: Path) -> GgufFile:
    """The checked header of a GGUF file.

    Raises:
        CheckpointError: the file is truncated, damaged or no GGUF; names the place.
        UnsupportedError: a version or a byte order that is not read.
    """
    with path.open("rb") as file:
        scan = _Scan(file, path)
        version, n_tensors, n_keys = _opening(scan)
        metadata: dict[str, Value] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(n_keys):
            start = scan.place
            key = scan.text("a key")
            if key in metadata:
                scan.fail(f"the key {key[:60]!r} occurs twice")
            metadata[key] = _value(scan, key)
            spans[key] = start, scan.place
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            scan.fail(f"general.alignment is {alignment!r:.40}; expected a power of two")
        entries = [_entry(scan) for _ in range(n_tensors)]
        data = aligned(scan.place, alignment)
        tensors = _laid_out(scan, entries, data, alignment)
        return GgufFile(path, version, metadata, spans, tensors, alignment, data, scan.size)


def read_list(path: Path, listed: Listed) -> list[str] | list[int] | list[float] | list[bool]:
    """The values of an array that was passed over.

    Raises:
        CheckpointError: a text in it is no UTF-8, or the file changed since.
    """
    with path.open("rb") as file:
        scan = _Scan(file, path)
        scan.skip(listed.offset, "an array")
        raw = scan.take(listed.nbytes, "an array")
    if listed.kind == BOOL:
        return [bool(byte) for byte in raw]
    if listed.kind != STRING:
        return list(struct.unpack(f"<{listed.count}{SCALARS[listed.kind][1]}", raw))
    texts, at = list[str](), 0
    try:
        for _ in range(listed.count):
            start = at + 8
            at = start + _LENGTH.unpack_from(raw, at)[0]
            texts.append(raw[start:at].decode("utf-8"))
    except (UnicodeDecodeError, struct.error):
        raise CheckpointError(
            f"{path}: text {len(texts):,} of an array is not UTF-8; the file is damaged or changed meanwhile: download "
            "or convert it again"
        ) from None
    return texts


def aligned(place: int, alignment: int) -> int:
    """The first multiple of `alignment` from `place` on."""
    return -(-place // alignment) * alignment


class _Scan:
    """A window that moves over a header; nothing is taken or skipped that the file does not have."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = path.stat().st_size
        self._window, self._start, self._at = b"", 0, 0

    @property
    def place(self) -> int:
        """Where the next byte lies in the file."""
        return self._start + self._at

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: {what} (at byte {self.place:,} of {self.size:,}); the file is damaged or no GGUF: download "
            "or convert it again"
        )

    def require(self, nbytes: int, what: str) -> None:
        """Fail where the file has no further `nbytes`, or a header would be too long."""
        if nbytes > self.size - self.place:
            self.fail(f"truncated: {what} takes {nbytes:,} bytes, {self.size - self.place:,} are left")
        if self.place + nbytes > _MOST_HEADER:
            self.fail(f"{what} would make the header longer than {_MOST_HEADER:,} bytes")

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes."""
        self.require(nbytes, what)
        self._fill(nbytes, what)
        self._at += nbytes
        return self._window[self._at - nbytes : self._at]

    def skip(self, nbytes: int, what: str) -> None:
        """Pass over bytes without reading them."""
        self.require(nbytes, what)
        self._at += nbytes

    def number(self, code: str, what: str) -> int | float:
        """The next number of a code of `struct`."""
        value: int | float = struct.unpack(code, self.take(struct.calcsize(code), what))[0]
        return value

    def count(self, code: str, what: str) -> int:
        """The next unsigned number."""
        return int(self.number(code, what))

    def text(self, what: str, longest: int = _LONGEST_TEXT) -> str:
        """The next text."""
        length = self.count("<Q", f"the length of {what}")
        if length > longest:
            self.fail(f"{what} has {length:,} bytes; expected at most {longest:,}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error.reason})")

    def skip_texts(self, count: int, what: str) -> None:
        """Pass over texts, of which only the lengths are looked at."""
        self.require(8 * count, what)
        while count:
            self._fill(8, what)
            window, at, last = self._window, self._at, len(self._window) - 8
            while count and at <= last:
                at += 8 + _LENGTH.unpack_from(window, at)[0]
                count -= 1
            self.skip(at - self._at, what)
            if count:
                self.require(8, what)

    def _fill(self, nbytes: int, what: str) -> None:
        """Make the window hold the next `nbytes`, which the file has."""
        if len(self._window) - self._at >= nbytes:
            return
        left = self._window[self._at :]
        self._start, self._at = self.place, 0
        self.file.seek(self._start + len(left))
        self._window = left + self.file.read(max(_CHUNK, nbytes) - len(left))
        if len(self._window) < nbytes:
            self.fail(f"ended while {what} was read; did the file change meanwhile?")


def _opening(scan: _Scan) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    if scan.take(min(4, scan.size), "the magic") != MAGIC:
        scan.fail("does not begin with 'GGUF'")
    version = scan.count("<I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise UnsupportedError(
                f"{scan.path}: a big-endian GGUF (version {swapped}); expected little-endian: convert the model again, "
                "or swap its bytes with gguf_convert_endian.py of llama.cpp"
            )
        raise UnsupportedError(
            f"{scan.path}: GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}: convert the model again "
            "with a current llama.cpp"
        )
    n_tensors, n_keys = scan.count("<Q", "the number of tensors"), scan.count("<Q", "the number of keys")
    if n_tensors > _MOST_TENSORS or n_keys > _MOST_KEYS:
        scan.fail(f"{n_tensors:,} tensors and {n_keys:,} keys; expected at most {_MOST_TENSORS:,} and {_MOST_KEYS:,}")
    return version, n_tensors, n_keys


def _value(scan: _Scan, key: str) -> Value:
    what = f"the value of {key[:60]!r}"
    kind = scan.count("<I", f"the kind of {what}")
    if kind in SCALARS:
        return scan.number(SCALARS[kind], what)
    if kind == BOOL:
        return bool(scan.count("<B", what))
    if kind == STRING:
        return scan.text(what)
    if kind != ARRAY:
        scan.fail(f"{what} is of kind {kind}, which there is not")
    kind, count = scan.count("<I", f"the kind of {what}"), scan.count("<Q", f"the length of {what}")
    start = scan.place
    if kind == STRING:
        scan.skip_texts(count, what)
    elif kind in SCALARS or kind == BOOL:
        scan.skip(count * (1 if kind == BOOL else struct.calcsize(SCALARS[kind])), what)
    else:
        scan.fail(f"{what} is an array of kind {kind}; expected numbers or texts")
    return Listed(kind, count, start, scan.place - start)


def _entry(scan: _Scan) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, offset and bytes of one tensor, by its place in the table."""
    name = scan.text("the name of a tensor", _LONGEST_NAME)
    what = f"tensor '{name}'"
    axes = scan.count("<I", what)
    if axes > _MOST_AXES:
        scan.fail(f"{what} has {axes:,} axes; expected at most {_MOST_AXES}")
    shape = tuple(scan.count("<Q", what) for _ in range(axes))[::-1]
    number = scan.count("<I", what)
    if number not in TYPES:
        scan.fail(f"{what} is of ggml's type {number}, which is not known")
    dtype = TYPES[number][0]
    nbytes = stored_bytes(dtype, shape)
    if nbytes is None:
        scan.fail(f"{what} of shape {list(shape)} is no whole number of blocks of {dtype}, or larger than 64 bits say")
    return name, dtype, shape, scan.count("<Q", what), nbytes


def _laid_out(
    scan: _Scan, entries: list[tuple[str, str, tuple[int, ...], int, int]], data: int, alignment: int
) -> dict[str, TensorInfo]:
    """The tensors at their absolute places, which must be those at which llama.cpp looks for them."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, dtype, shape, offset, nbytes in entries:
        if name in tensors:
            scan.fail(f"there are two tensors '{name}'")
        if offset != expected:
            wrong = (
                f"is not aligned to {alignment}" if offset % alignment
                else "overlaps the one before it" if offset < expected
                else "leaves a hole before it"
            )  # fmt: skip
            scan.fail(f"tensor '{name}' at byte {offset:,} of the data {wrong} (expected byte {expected:,})")
        if data + offset + nbytes > scan.size:
            scan.fail(f"truncated: tensor '{name}' ends at byte {data + offset + nbytes:,}")
        tensors[name] = TensorInfo(name, dtype, shape, scan.path.name, data + offset, nbytes)
        expected = aligned(offset + nbytes, alignment)
    return tensors
