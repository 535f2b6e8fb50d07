"""Consolidate the experts of several fine-tuned mixture-of-experts checkpoints into one bundle.

The names in `__all__` and the error tree in `moemerge.errors` are the public interface; everything else
may change without notice. Names are imported when they are first used, so that `import moemerge` costs
nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moemerge.bundle.export import export_variant
    from moemerge.bundle.reader import Bundle, open_bundle
    from moemerge.bundle.verify import verify_bundle
    from moemerge.checkpoint.tokenizer import load_tokenizer
    from moemerge.checkpoint.variants import VariantSet, open_variants
    from moemerge.consolidation.layers import write_similarity
    from moemerge.consolidation.pipeline import Merged, merge
    from moemerge.consolidation.plan import ConsolidationPlan, read_plan, write_plan
    from moemerge.consolidation.planning import PlanOptions, plan_variants
    from moemerge.consolidation.task import options_of
    from moemerge.errors import Finding, MoemergeError
    from moemerge.refs import parse_source
    from moemerge.runner.engine import Engine
    from moemerge.runner.options import EngineOptions
    from moemerge.runner.request import Output, Request
    from moemerge.runner.sampling import Sampling
    from moemerge.runner.service import EngineService
    from moemerge.runner.transfer import Swap

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "bundle.reader",
    "ConsolidationPlan": "consolidation.plan",
    "Engine": "runner.engine",
    "EngineOptions": "runner.options",
    "EngineService": "runner.service",
    "Finding": "errors",
    "Merged": "consolidation.pipeline",
    "MoemergeError": "errors",
    "Output": "runner.request",
    "PlanOptions": "consolidation.planning",
    "Request": "runner.request",
    "Sampling": "runner.sampling",
    "Swap": "runner.transfer",
    "VariantSet": "checkpoint.variants",
    "export_variant": "bundle.export",
    "load_tokenizer": "checkpoint.tokenizer",
    "merge": "consolidation.pipeline",
    "open_bundle": "bundle.reader",
    "open_variants": "checkpoint.variants",
    "options_of": "consolidation.task",
    "parse_source": "refs",
    "plan_variants": "consolidation.planning",
    "read_plan": "consolidation.plan",
    "verify_bundle": "bundle.verify",
    "write_plan": "consolidation.plan",
    "write_similarity": "consolidation.layers",
}

__all__ = [
    "Bundle",
    "ConsolidationPlan",
    "Engine",
    "EngineOptions",
    "EngineService",
    "Finding",
    "Merged",
    "MoemergeError",
    "Output",
    "PlanOptions",
    "Request",
    "Sampling",
    "Swap",
    "VariantSet",
    "__version__",
    "export_variant",
    "load_tokenizer",
    "merge",
    "open_bundle",
    "open_variants",
    "options_of",
    "parse_source",
    "plan_variants",
    "read_plan",
    "verify_bundle",
    "write_plan",
    "write_similarity",
]


def __getattr__(name: str) -> object:
    """A public name, imported from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
