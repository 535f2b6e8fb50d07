"""The small files of a checkpoint with an adapter: the base's, and what the adapter brings along."""

from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.repository import Repository
from moemerge.checkpoint.side_files import find_licence, licence_files, side_files

# A tokenizer is one thing in several files, of which one base's and one adapter's half would be none.
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json"}
_TOKENIZER = _VOCABULARIES | {
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
}  # fmt: skip


class AdaptedFiles:
    """A repository without weights: configuration, tokenizer, templates, licences and card."""

    def __init__(self, base: Repository, adapter: Repository) -> None:
        self._base, self._adapter = base, adapter
        self._sources = _choose(base, adapter)
        self._made: dict[str, bytes] = {}
        if licence := _licence(base, adapter):
            self.put(
                "README.md", f"---\nlicense: {licence}\n---\n\n{adapter.origin} applied to {base.origin}.\n"
            )

    @property
    def label(self) -> str:
        """Both, as a reference names them."""
        return f"{self._base.label}+{self._adapter.label}"

    @property
    def origin(self) -> str:
        """Both, as a reference names them."""
        return f"{self._base.origin}+{self._adapter.origin}"

    def files(self) -> dict[str, int]:
        """Sizes in bytes by file name."""
        sizes = {name: source.files()[original] for name, (source, original) in self._sources.items()}
        return sizes | {name: len(content) for name, content in self._made.items()}

    def read_bytes(self, name: str) -> bytes:
        """A small file."""
        if name in self._made:
            return self._made[name]
        source, original = self._sources[name]
        return source.read_bytes(original)

    def header(self, name: str) -> dict[str, StoredTensor]:
        """Tensors of one of the base's files."""
        return self._base.header(name)

    def put(self, name: str, text: str) -> None:
        """Let a file have this content, whatever base and adapter have under its name."""
        self._made[name] = text.encode("utf-8")


def _choose(base: Repository, adapter: Repository) -> dict[str, tuple[Repository, str]]:
    """Where each file comes from: repository, and name there."""
    theirs = [name for name in side_files(adapter) if name != "config.json"]
    chosen = {name: (base, name) for name in side_files(base)}
    if _VOCABULARIES & {*theirs}:
        # Its template may be within its configuration; another's file would win over that.
        chosen = {n: s for n, s in chosen.items() if n not in _TOKENIZER and "chat_template" not in n}
    chosen |= {
        name: (adapter, name) for name in theirs if _VOCABULARIES & {*theirs} or name not in _TOKENIZER
    }
    chosen |= {name: (base, name) for name in licence_files(base)}
    for name in licence_files(adapter):
        chosen[f"{name}.adapter" if name in chosen else name] = (adapter, name)
    return chosen


def _licence(base: Repository, adapter: Repository) -> str | None:
    """The licence that both have, or one of them; `other` when they differ."""
    named = {licence for licence in (find_licence(base), find_licence(adapter)) if licence}
    return named.pop() if len(named) == 1 else "other" if named else None
