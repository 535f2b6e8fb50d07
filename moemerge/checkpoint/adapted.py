"""A checkpoint with an adapter applied to it: known from headers, computed once into a cache.

Tensors that the adapter does not touch stay where they are in the base's files, byte for byte. Those
that it changes are written to one file, some rows at a time, whatever their number.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from moemerge.checkpoint.adapted_files import AdaptedFiles
from moemerge.checkpoint.adapter import Adapter
from moemerge.checkpoint.adapter_change import Change, changed_rows
from moemerge.checkpoint.adapter_match import match_adapter
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.conversions import convert_once
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.tensors import TensorReader, bytes_of
from moemerge.checkpoint.writer import TensorToWrite, write_tensors
from moemerge.errors import Finding, raise_findings
from moemerge.progress import Progress, Silent

_FILE = "changed.safetensors"
# Changes when the same base and adapter would give other bytes.
_ARITHMETIC = "moemerge/adapter@1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A base and an adapter that fits it.

    Attributes:
        base: Opened; its files hold what the adapter leaves alone.
        adapter: Read.
        changes: By canonical name.
        checkpoint: What comes out. Tensors in `changes` are not local: `apply` makes them.
    """

    base: Checkpoint
    adapter: Adapter
    changes: dict[str, Change]
    checkpoint: Checkpoint

    def apply(self, cache: Path, progress: Progress | None = None) -> Checkpoint:
        """The same with all tensors in files, those that change written to `cache` unless they are there.

        Raises:
            NotEnoughRoom: The disk of `cache` is too small.
            DamagedInput: A changed tensor is not finite.
        """
        label = self.checkpoint.label
        changed = {name: t for name, t in self.checkpoint.by_name().items() if name in self.changes}
        total = sum(tensor.nbytes for tensor in changed.values())
        with TensorReader() as reader:
            write = partial(self._write, changed, reader, progress or Silent())
            key = self._digest(reader)
            place = convert_once(cache, key, write, needed=total, purpose=f"applying {label}")
        return self.checkpoint.replaced(
            read_header(place / _FILE),
            repository=LocalFolder(place, label, self.checkpoint.repository.origin),
        )

    def _write(
        self, changed: dict[str, StoredTensor], reader: TensorReader, progress: Progress, place: Path
    ) -> None:
        progress.start(f"apply {self.checkpoint.label}", sum(tensor.nbytes for tensor in changed.values()))
        originals = self.base.by_name()
        tensors = [
            TensorToWrite(
                name=name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                chunks=partial(_chunks, self.changes[name], originals[name], reader),
            )
            for name, tensor in changed.items()
        ]
        write_tensors(place / _FILE, tensors, advance=progress.advance)
        for name in self.checkpoint.repository.files():
            (place / name).write_bytes(self.checkpoint.repository.read_bytes(name))

    def _digest(self, reader: TensorReader) -> str:
        """Of samples of all tensors, and of small files whole."""
        hasher = blake3(f"{_ARITHMETIC} {fingerprint(self.base, reader)}\n".encode())
        for name, tensor in sorted(self.adapter.tensors.items()):
            hasher.update(f"{name} {reader.sample_digest(tensor)}\n".encode())
        hasher.update(self.adapter.config.model_dump_json().encode())
        for name in sorted(self.checkpoint.repository.files()):
            raw = self.checkpoint.repository.read_bytes(name)
            hasher.update(f"{name} {len(raw)}\n".encode() + raw)
        return hasher.hexdigest(16)


def adapt(base: Checkpoint, adapter: Adapter) -> Adapted:
    """What an adapter makes of a checkpoint, from headers alone.

    Raises:
        IncompatibleInputs: With everything about the adapter that does not fit.
    """
    files = AdaptedFiles(base.repository, adapter.repository)
    matched = match_adapter(adapter, base)
    raise_findings(matched.findings, f"{adapter.repository.label} cannot be applied to {base.label}")
    originals = base.by_name()
    # Until it is applied, a changed tensor is nowhere but in the adapter.
    place = Path(adapter.repository.label)
    tensors = {
        name: StoredTensor(
            path=place, name=name, dtype=t.dtype, shape=change.shape(t), start=0, is_local=False
        )
        for name, change in matched.changes.items()
        for t in [originals[name]]
    }
    settings, config = dict(base.settings), dict(base.config)
    if matched.vocab_size is not None:
        keys = base.family.settings["vocab_size"].keys
        key = next((key for key in keys if key in config), keys[0])
        settings["vocab_size"] = config[key] = matched.vocab_size
        files.put("config.json", json.dumps(config, indent=2) + "\n")
    checkpoint = base.replaced(
        tensors,
        label=files.label,
        repository=files,
        settings=settings,
        config=config,
        findings=(*base.findings, *_remarks(base, adapter, matched.changes)),
    )
    return Adapted(base=base, adapter=adapter, changes=matched.changes, checkpoint=checkpoint)


def _remarks(base: Checkpoint, adapter: Adapter, changes: dict[str, Change]) -> Iterator[Finding]:
    """What should be known of an adapter that can be applied."""
    label, config = adapter.repository.label, adapter.config
    named, given = _hub_name(config.base_model_name_or_path), _hub_name(base.repository.origin)
    if named and given and named != given:
        yield Finding(
            level="warning",
            code="ADAPTER_BASE",
            where=label,
            found=f"was made for {named}, is applied to {given}",
            fix="It fits by shape alone; make sure that both have the same weights",
        )
    if base.settings["tied_head"] and "embedding" in changes:
        found = "changes the embedding, to which the head is tied: both change, as when peft merges it"
        yield Finding(level="warning", code="ADAPTER_TIED", where=label, found=found)
    if config.fan_in_fan_out:
        found = "fan_in_fan_out is true and ignored, as by peft: weights here are [out, in]"
        yield Finding(level="note", code="ADAPTER_CONFIG", where=label, found=found)


def _hub_name(reference: str | None) -> str | None:
    """The repository that a reference or an origin names; None for a folder."""
    text = reference or ""
    return text.partition("@")[0].lower() if text.count("/") == 1 and text[0] not in "./~" else None


def _chunks(change: Change, original: StoredTensor, reader: TensorReader) -> Iterator[memoryview]:
    for rows in changed_rows(change, original, reader):
        yield bytes_of(rows.contiguous())
