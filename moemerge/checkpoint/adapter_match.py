"""Which tensors of a checkpoint an adapter changes, and how: every tensor of the adapter has one place.

Pure: names, shapes and settings in, changes and findings out. An adapter names modules as the library
did that it was trained with, so all names that a family's tensors have are known here, whatever the
layout of the checkpoint.
"""

import re
from dataclasses import dataclass, field

from moemerge.checkpoint.adapter import Adapter
from moemerge.checkpoint.adapter_change import Change, LowRank
from moemerge.checkpoint.checkpoint import Checkpoint, expert_name
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.match import nearest
from moemerge.checkpoint.modules import Stack, name_modules, name_stacks
from moemerge.errors import Finding

_PREFIX = "base_model.model."
_KEY = re.compile(
    re.escape(_PREFIX) + r"(?P<module>.+?)\.(?P<factor>lora_A\.weight|lora_B\.weight|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector(\.weight)?"
    r"|base_layer\.weight|modules_to_save\.weight|original_module\.weight|weight)"
)
_LINEAR, _EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
# The first that is there counts. Some are written twice, with what stood there before training beside them.
_REPLACED = ("base_layer.weight", "weight", "modules_to_save.weight")
_BEFORE = "original_module.weight"
_SHOWN = 3
# From this version on, the output of stacked experts is their second dimension to peft; before, their third.
_OUTPUT_FIRST_SINCE = (0, 19, 1)


@dataclass(slots=True)
class MatchedAdapter:
    """What `match_adapter` found.

    Attributes:
        changes: By canonical name of the tensor.
        vocab_size: Rows of embedding and head afterwards; None when they stay as they are.
        findings: Everything that does not fit.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    vocab_size: int | None = None
    findings: list[Finding] = field(default_factory=list)


def match_adapter(adapter: Adapter, base: Checkpoint) -> MatchedAdapter:
    """Give every tensor of an adapter its place in the checkpoint that it is applied to."""
    matching = _Matching(adapter, base)
    for module, factors in matching.group().items():
        matching.place(module, factors)
    return matching.finish()


class _Matching:
    """One adapter on its way into one checkpoint, and what went wrong so far, by kind."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self._adapter, self._config, self._base = adapter, adapter.config, base
        self._tensors = base.by_name()
        self._modules, self._resizable = name_modules(base)
        self._stacks = name_stacks(base)
        self._matched = MatchedAdapter()
        self._problems: dict[str, list[str]] = {}

    def group(self) -> dict[str, dict[str, StoredTensor]]:
        """The adapter's tensors by module, then by what they are to it."""
        grouped: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self._adapter.tensors.items():
            if (whole := name.removeprefix(_PREFIX)) in self._modules:
                grouped.setdefault(whole, {})["weight"] = tensor
                continue
            match = _KEY.fullmatch(name)
            if match is None:
                self._note("KEYS", name)
                continue
            factor = match["factor"]
            if factor.startswith("lora_"):
                factor = factor.removesuffix(".weight")
            grouped.setdefault(match["module"], {})[factor] = tensor
        return grouped

    def place(self, module: str, factors: dict[str, StoredTensor]) -> None:
        """Turn the tensors of one module into changes of the checkpoint's."""
        stacks = self._stacks.get(re.sub(r"(\.base_layer)+$", "", module))
        name = self._modules.get(module)
        if stacks and factors.keys() == {*_LINEAR}:
            self._place_stacked(module, factors, stacks)
        elif name is None:
            # Likeness takes long to find, and few are shown.
            is_shown = len(self._problems.get("KEYS", ())) < _SHOWN
            like = nearest(module, list(self._modules)) if is_shown else ""
            self._note("KEYS", *(f"{tensor.name}{like}" for tensor in factors.values()))
        elif name not in self._tensors:
            self._note("TIED", f"{module} ({name})")
        else:
            self._place_module(module, name, factors)

    def finish(self) -> MatchedAdapter:
        """Everything found, after a look at all of it together."""
        self._check_vocabulary()
        if not self._matched.changes and not self._problems:
            self._note("EMPTY", "nothing would change")
        for code, problems in self._problems.items():
            self._matched.findings.append(self._summarise(code, problems))
        return self._matched

    def _place_module(self, module: str, name: str, factors: dict[str, StoredTensor]) -> None:
        left = {key: tensor for key, tensor in factors.items() if key != _BEFORE}
        replacement = next(filter(None, [left.pop(key, None) for key in _REPLACED]), None)
        magnitude = left.pop(_MAGNITUDE, None)
        shape = self._tensors[name].shape
        if replacement is not None and not self._fits_whole(replacement, name, shape):
            return
        shape = replacement.shape if replacement is not None else shape
        is_embedding = left.keys() == {*_EMBEDDING}
        if not left and magnitude is None and replacement is not None:
            self._change(name, Change(replacement=replacement), module)
            return
        if not is_embedding and left.keys() != {*_LINEAR}:
            self._note("INCOMPLETE", f"{module} has {', '.join(sorted(factors))}")
            return
        a, b = (left[key] for key in (_EMBEDDING if is_embedding else _LINEAR))
        if (magnitude is not None) != self._config.use_dora:
            self._note("INCOMPLETE", f"{module} has {'a' if magnitude else 'no'} {_MAGNITUDE}")
        elif self._fits(module, a, b, magnitude, shape, is_embedding=is_embedding):
            low_rank = LowRank(
                a=a, b=b, magnitude=magnitude, is_transposed=is_embedding, scale=self._config.scale(module)
            )
            self._change(name, Change(replacement=replacement, low_rank=low_rank), module)

    def _change(self, name: str, change: Change, module: str) -> None:
        if name in self._matched.changes:
            self._note("TWICE", f"{module} ({name})")
        self._matched.changes[name] = change

    def _fits_whole(self, tensor: StoredTensor, name: str, shape: tuple[int, ...]) -> bool:
        is_longer = name in self._resizable and tensor.shape[1:] == shape[1:]
        if tensor.shape == shape or (is_longer and tensor.shape[0] > 0):
            return True
        self._note("SHAPE", f"{tensor.name} {list(tensor.shape)}, expected {list(shape)}")
        return False

    def _fits(
        self,
        module: str,
        a: StoredTensor,
        b: StoredTensor,
        magnitude: StoredTensor | None,
        shape: tuple[int, ...],
        *,
        is_embedding: bool,
    ) -> bool:
        if len(shape) != 2:
            self._note("SHAPE", f"{a.name}: {module} is no matrix but {list(shape)}")
            return False
        if not self._has_rank(module, a, 1):
            return False
        rank = self._config.rank(module)
        rows, columns = (shape[1], shape[0]) if is_embedding else shape
        expected: dict[str, tuple[int, ...]] = {a.name: (rank, columns), b.name: (rows, rank)}
        found = {a.name: a.shape, b.name: b.shape}
        if magnitude is not None:
            expected[magnitude.name], found[magnitude.name] = (rows,), magnitude.shape
        wrong = [name for name, sizes in found.items() if sizes != expected[name]]
        self._note("SHAPE", *(f"{n} {list(found[n])}, expected {list(expected[n])}" for n in wrong))
        return not wrong

    def _has_rank(self, module: str, a: StoredTensor, experts: int) -> bool:
        rank = self._config.rank(module) * experts
        if len(a.shape) == 2 and a.shape[0] == rank:
            return True
        stacked = f" for {experts} experts" if experts > 1 else ""
        self._note("RANK", f"{a.name} {list(a.shape)}, configured {rank // experts}{stacked}")
        return False

    def _place_stacked(self, module: str, factors: dict[str, StoredTensor], stacks: list[Stack]) -> None:
        """The name says only how deep the tensor is nested: which one it is, its shape tells."""
        a, b = factors["lora_A"], factors["lora_B"]
        if len(a.shape) != 2 or len(b.shape) != 2:
            self._note(
                "SHAPE", f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)}, expected two matrices"
            )
            return
        sizes = (b.shape[0], a.shape[1])
        plain = [(stack, False) for stack in stacks if stack.shape == sizes]
        swapped = [(stack, True) for stack in stacks if stack.shape == sizes[::-1]]
        fitting = [*plain, *swapped]
        if len({stack.parameter for stack, _ in fitting}) == 1 and len(fitting) == 2:
            fitting = self._of_version(plain, swapped)
        if not fitting:
            expected = " or ".join(f"{list(stack.shape)} for {stack.parameter}" for stack in stacks)
            self._note("SHAPE", f"{b.name} and {a.name} make {list(sizes)}, expected {expected}")
        elif len(fitting) > 1:
            names = " or ".join(
                f"{stack.parameter}{' transposed' if is_swapped else ''}" for stack, is_swapped in fitting
            )
            self._note("AMBIGUOUS", f"{module} may be {names}")
        else:
            self._add_stacked(*fitting[0], a, b)

    def _of_version(
        self, plain: list[tuple[Stack, bool]], swapped: list[tuple[Stack, bool]]
    ) -> list[tuple[Stack, bool]]:
        """Of two orientations the one that the version of peft had; both where that is not known."""
        version = re.match(r"(\d+)\.(\d+)\.(\d+)", self._config.peft_version or "")
        if version is None:
            return [*plain, *swapped]
        return plain if tuple(map(int, version.groups())) >= _OUTPUT_FIRST_SINCE else swapped

    def _add_stacked(self, stack: Stack, is_swapped: bool, a: StoredTensor, b: StoredTensor) -> None:
        experts = self._base.num_experts
        if not self._has_rank(stack.parameter, a, experts):
            return
        if b.shape[1] != a.shape[0]:
            self._note("SHAPE", f"{b.name} {list(b.shape)}, expected {[b.shape[0], a.shape[0]]}")
            return
        for slot in range(experts):
            for part, outputs in stack.parts.items():
                name = expert_name(stack.layer.index, slot, part)
                low_rank = LowRank(
                    a=a,
                    b=b,
                    scale=self._config.scale(stack.parameter),
                    is_transposed=is_swapped,
                    slot=(slot, experts),
                    outputs=outputs,
                )
                self._change(name, Change(low_rank=low_rank), stack.parameter)

    def _check_vocabulary(self) -> None:
        """Embedding and head keep as many rows as each other."""
        rows = {
            name: self._matched.changes[name].shape(tensor)[0]
            if name in self._matched.changes
            else tensor.shape[0]
            for name, tensor in self._tensors.items()
            if name in self._resizable
        }
        if len({*rows.values()}) > 1:
            self._note("VOCABULARY", ", ".join(f"{name} has {count}" for name, count in rows.items()))
        elif rows and (count := next(iter(rows.values()))) != self._base.settings["vocab_size"]:
            self._matched.vocab_size = count

    def _note(self, code: str, *problems: str) -> None:
        if problems:
            self._problems.setdefault(code, []).extend(problems)

    def _summarise(self, code: str, problems: list[str]) -> Finding:
        summary, fix = _SUMMARIES[code]
        tensors, modules = _counted(len(problems), "tensor"), _counted(len(problems), "module")
        what = summary.format(tensors=tensors, modules=modules, base=self._base.label)
        shown = "; ".join(problems[:_SHOWN])
        rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        return Finding(
            level="error",
            code=f"ADAPTER_{code}",
            where=self._adapter.repository.label,
            found=f"{what}: {shown}{rest}",
            fix=fix,
        )


_ANOTHER = "Is it an adapter of another model?"
_SUMMARIES = {
    "EMPTY": ("no tensors", "Is the download complete?"),
    "KEYS": ("{tensors} without a module in {base}", _ANOTHER),
    "SHAPE": ("{tensors} that do not fit {base}", _ANOTHER),
    "RANK": (
        "{tensors} of another rank than r and rank_pattern of adapter_config.json say",
        "Do the configuration and the weights belong together?",
    ),
    "INCOMPLETE": (
        "{modules} without some tensors, or with some that adapter_config.json does not speak of",
        "Is the download complete, and does the configuration belong to these weights?",
    ),
    "AMBIGUOUS": (
        "{tensors} of stacked experts that fit more than one parameter",
        "Merge it with the version of peft that made it and give the result",
    ),
    "TWICE": (
        "{modules} that tensors of two names change",
        "Merge it with the version of peft that made it and give the result",
    ),
    "VOCABULARY": (
        "embedding and head of different vocabularies",
        "Both must be in modules_to_save when tokens are added",
    ),
    "TIED": (
        "{modules} tied to another in {base}, without a tensor of its own",
        "Merge it with peft, with tie_word_embeddings false, and give the result",
    ),
}


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
