"""Whether systems give the right tokens: exactly in float32, and as near as rounding allows otherwise.

In float32 every system must give the tokens of stand-alone models, transformers' where it is installed. In
bf16 sums are rounded otherwise in another batch, a router may then choose another of two experts that are
nearly as good, and one token that comes out otherwise changes all that follow it. There each token is looked
up in a float32 pass over the same text: it is off when its logit is clearly below the largest. Few tokens may
be off, and of no answer the half. With another variant's weights five of six are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from moemerge.bench.metrics import Record
from moemerge.bench.systems import Placement, Subject, System
from moemerge.bench.worker import WorkerFailed, last_line
from moemerge.bench.workloads import Trace, all_at_once, shorten
from moemerge.errors import QualityGateFailed

TOLERANCE = 0.3
"""Difference of logits from the largest from which a token is off. Logits of generated models have a standard
deviation of about 1, trained ones have more."""
MOST_OFF = 0.1
"""Largest share of a system's tokens that may be off."""
LOOKED_UP = 16
"""Answers of each system that are looked up: a pass in float32 takes long."""
_REQUESTS_PER_VARIANT = 2
_OUTPUT_TOKENS = 8
_LIMIT_S = 600.0
_REFERENCE = "transformers"

Text = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Variant, prompt, answer."""


def check_float32(
    systems: Sequence[str], subject: Subject, placement: Placement, trace: Trace, say: Callable[[str], None]
) -> tuple[str, int]:
    """Compare all systems in float32 on the start of a trace, all requests at once, with short answers.

    Returns:
        Whose tokens were the reference, and how many requests were compared.

    Raises:
        QualityGateFailed: A system gave another token; the message names the first.
    """
    short = all_at_once(shorten(trace, _REQUESTS_PER_VARIANT * len(subject.variants), _OUTPUT_TOKENS))
    exact = replace(placement, dtype="float32")
    reference = _REFERENCE if _REFERENCE in systems else "alone"
    # `single` answers for its one variant; what it is asked for then is compared with that variant's answers.
    right = {
        (variant, prompt): answer
        for variant, prompt, answer in _answers(
            reference, subject, exact, _for_every_variant(short, subject), say
        )
    }
    for name in systems:
        if name == reference:
            continue
        try:
            found = _answers(name, subject, exact, short, say)
        except WorkerFailed as error:
            say(f"check: {name} cannot serve this ({last_line(str(error))})")
            continue
        for variant, prompt, answer in found:
            wanted = right[variant, prompt]
            if answer != wanted:
                place = next(i for i, (a, b) in enumerate(zip(answer, wanted, strict=True)) if a != b)
                raise QualityGateFailed(
                    f"{name}, {variant}: token {place} of an answer is {answer[place]}, {reference} has "
                    f"{wanted[place]}, in float32. The systems do not compute the same"
                )
    return reference, len(short)


def _for_every_variant(trace: Trace, subject: Subject) -> Trace:
    """Each request for its own variant, and for the first one, which `single` asks."""
    first = tuple(replace(arrival, variant=subject.variants[0]) for arrival in trace)
    return tuple(dict.fromkeys((*trace, *first)))


def _answers(
    name: str, subject: Subject, placement: Placement, trace: Trace, say: Callable[[str], None]
) -> list[Text]:
    say(f"check: {name} in float32")
    if name == "alone":
        # One request after the other, where nothing but the engine is installed.
        with System("mixed", subject, placement, max_batch=1) as system:
            outcome = system.run(trace, _LIMIT_S)
    else:
        with System(name, subject, placement) as system:
            outcome = system.run(trace, _LIMIT_S)
    return [
        (variant, arrival.prompt_ids, record.token_ids)
        for variant, arrival, record in zip(outcome.asked, trace, outcome.records, strict=True)
    ]


def off_shares(
    texts: Mapping[str, Sequence[Text]], subject: Subject, placement: Placement, say: Callable[[str], None]
) -> dict[str, float]:
    """By system, share of the tokens of its first answers that are off; empty for encoder-decoders.

    Raises:
        QualityGateFailed: Too many of a system's tokens, or half of an answer.
    """
    if not subject.is_decoder:
        return {}
    chosen = {system: [text for text in found if text[2]][:LOOKED_UP] for system, found in texts.items()}
    distinct = list(dict.fromkeys(text for found in chosen.values() for text in found))
    if not distinct:
        return {}
    say(f"check: {len(distinct)} answers by a float32 pass over each")
    with System("mixed", subject, replace(placement, dtype="float32")) as system:
        gaps = dict(zip(distinct, system.probe("token_gaps", texts=distinct), strict=True))
    return {name: _off_share(name, [gaps[text] for text in found]) for name, found in chosen.items() if found}


def _off_share(system: str, gaps: Sequence[Sequence[float]]) -> float:
    off = [[gap > TOLERANCE for gap in answer] for answer in gaps]
    share = sum(map(sum, off)) / sum(map(len, off))
    worst = max(sum(answer) / len(answer) for answer in off)
    if share > MOST_OFF or worst > 1 / 2:
        raise QualityGateFailed(
            f"{system}: {share:.0%} of the tokens looked up, and of the worst answer {worst:.0%}, are more "
            f"than {TOLERANCE} logits below the likeliest one in float32; rounding explains at most "
            f"{MOST_OFF:.0%}, and half of an answer. It does not compute what it should"
        )
    return share


def equal_shares(answers: dict[str, list[tuple[Text, Record]]]) -> dict[str, float]:
    """By system, share of requests whose answer equals the first system's that had the same question."""
    first: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    shares = {}
    for system, texts in answers.items():
        equal = [
            first.setdefault(text[:2], text[2]) == text[2] for text, record in texts if record.is_finished
        ]
        if equal:
            shares[system] = sum(equal) / len(equal)
    return shares
