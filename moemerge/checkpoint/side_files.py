"""Files of a checkpoint besides its weights: configuration, tokenizer, templates, licence."""

import re

from moemerge.checkpoint.repository import Repository

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "specail_tokens_map.json",  # TeleChat-12B's spelling
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATE = re.compile(r"[\w][\w.-]*\.jinja")
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying|notice|use_policy)([._-][\w.-]*)?", re.IGNORECASE)


def is_side_file(name: str) -> bool:
    """Whether a name is one that a variant may bring along."""
    return any((name in SIDE_FILES, _TEMPLATE.fullmatch(name), _LICENCE_FILE.fullmatch(name)))


def side_files(repository: Repository) -> list[str]:
    """Names of the files that a variant needs to be used, as far as it has them."""
    present = repository.files()
    templates = [name for name in present if _TEMPLATE.fullmatch(name) and name not in SIDE_FILES]
    return [name for name in SIDE_FILES if name in present] + templates


def licence_files(repository: Repository) -> list[str]:
    """Names of licence texts and notices."""
    return [name for name in repository.files() if _LICENCE_FILE.fullmatch(name)]


def find_side_files(repository: Repository) -> list[str]:
    """Names of all that is fetched or copied along with the weights: also card and adapter configuration."""
    others = [name for name in repository.files() if name in ("README.md", "adapter_config.json")]
    return [*side_files(repository), *licence_files(repository), *others]


def find_licence(repository: Repository) -> str | None:
    """The licence that the model card's metadata names, if it does."""
    if "README.md" not in repository.files():
        return None
    card = repository.read_bytes("README.md").decode("utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    match = re.search(r"^license:\s*[\"']?([\w.-]+)", front[1], re.MULTILINE) if front else None
    return match[1] if match else None
