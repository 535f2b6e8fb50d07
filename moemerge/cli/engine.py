"""What commands that run an engine share: its options, what they must be, and a bundle with all its files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.progress import show_progress
from moemerge.errors import DamagedBundle, InvalidRecipe

if TYPE_CHECKING:
    from moemerge.bundle.reader import Bundle
    from moemerge.runner.engine import Engine
    from moemerge.runner.options import EngineOptions

_THREADS_PER_PROCESSOR = 4

ResidentOption = Annotated[
    str,
    typer.Option("--resident", metavar="N|all|SIZE", help="Variants that may be in device memory at once."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.", envvar="MOEMERGE_DEVICE")]


def check_resident(text: str) -> str:
    """The text of `--resident`, if it can be.

    Raises:
        InvalidRecipe: It cannot.
    """
    from moemerge.runner.options import parse_resident

    try:
        parse_resident(text)
    except InvalidRecipe as error:
        raise InvalidRecipe(
            f"--resident {text!r}, expected all, a number of variants from 1 on, or a size such as 4GiB"
        ) from error
    return text


def size_of(option: str, text: str | None) -> int | None:
    """Bytes of an option; None when it was not given.

    Raises:
        InvalidRecipe: Not a size, or nothing.
    """
    from moemerge.checkpoint.sizes import parse_size

    if text is None:
        return None
    try:
        size = parse_size(text)
    except InvalidRecipe as error:
        raise InvalidRecipe(f"{option}: {error}") from error
    if size < 1:
        raise InvalidRecipe(f"{option} {text!r}, expected more than nothing")
    return size


def check_threads(count: int | None) -> None:
    """More threads than this only wait for each other, and thousands end the process.

    Raises:
        InvalidRecipe: There are too few processors for so many.
    """
    processors = os.cpu_count() or 1
    most = _THREADS_PER_PROCESSOR * processors
    if count is not None and count > most:
        raise InvalidRecipe(
            f"--threads {count}, expected at most {most}: this machine has {processors} processors"
        )


def load_engine(bundle: "Bundle", options: "EngineOptions", *, quiet: bool) -> "Engine":
    """An engine; progress is shown while its pool is loaded.

    Raises:
        MoemergeError: As `Engine`.
    """
    from moemerge.runner.engine import Engine

    with show_progress(quiet=quiet) as progress:
        return Engine(bundle, options, progress)


def open_with_files(folder: Path) -> "Bundle":
    """A bundle that has every file its manifest names; what is in them is for `moemerge verify`.

    Raises:
        MoemergeError: As `open_bundle`.
        DamagedBundle: Files are missing.
    """
    from moemerge.bundle.reader import open_bundle, residual_files

    bundle = open_bundle(folder)
    manifest = bundle.manifest
    files = {layer.file for layer in manifest.layers}
    for name, variant in manifest.variants.items():
        files |= {*variant.tensors.values(), *variant.files.values(), *residual_files(name, variant)}
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DamagedBundle(f"{folder / missing[0]}: is missing{more}. Copy or build the bundle again")
    return bundle
