"""Tiny bundles for whatever serves them, from the checkpoints of `tests.factories`.

    folder = write_bundle(tmp_path, "mixtral")            # sources beside it, in folder.parent / name

Four variants of one base. `plain` is a fine-tune of it; `large` has more tokens; `twin` differs from
`plain` in routers and experts only, so that the bundle stores everything else once for both; `odd` has a
different arithmetic where the family has one: another rotary base and a sliding window.
"""

from pathlib import Path

from moemerge.bundle.reader import Bundle, open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.recipe import options_of
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from tests.factories import write_checkpoint

NAMES = ("plain", "large", "twin", "odd")
VOCABULARIES = {"plain": 64, "large": 96, "twin": 64, "odd": 66}
WINDOW = 6


def write_family(folder: Path, family: str = "mixtral", dtype: str = "F32") -> dict[str, Path]:
    """The four checkpoints, in folders of their names."""
    base = write_checkpoint(folder / "base", family, dtype=dtype)
    odd = {"rope_theta": 300.0, "sliding_window": WINDOW} if family == "mixtral" else {}
    plain = write_checkpoint(folder / "plain", base=base, noise=0.3, seed=1)
    large = write_checkpoint(folder / "large", base=base, noise=0.3, seed=2, vocab=VOCABULARIES["large"])
    twin = write_checkpoint(folder / "twin", base=plain, noise=0.3, seed=3, only=_is_routing)
    other = write_checkpoint(
        folder / "odd", base=base, noise=0.3, seed=4, vocab=VOCABULARIES["odd"], settings=odd
    )
    return dict(zip(NAMES, (plain, large, twin, other), strict=True))


def write_bundle(folder: Path, family: str = "mixtral", *, dtype: str = "F32", budget: str = "exact") -> Path:
    """A bundle of the four, `folder / "x.moe"`."""
    variants = open_variants({n: FolderRef(path) for n, path in write_family(folder, family, dtype).items()})
    merge(variants, folder / "x.moe", options_of(budget, None, within=False))
    return folder / "x.moe"


def open_engine(bundle: Bundle | Path, **options: object) -> Engine:
    """An engine over a bundle."""
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return Engine(opened, EngineOptions(**options))  # type: ignore[arg-type]


def _is_routing(name: str) -> bool:
    return name.startswith("experts.") or name.endswith("router")
