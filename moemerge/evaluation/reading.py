"""What a model predicts of passages, token by token, and how far another model is from it.

Shapes: T tokens, K slots per token, W predicted tokens, Vo vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.calibration.passes import num_predicted
from moemerge.calibration.texts import Passage
from moemerge.errors import IncompatibleInputs
from moemerge.evaluation.samples import Sample
from moemerge.evaluation.tasks import greedy_answers
from moemerge.models import Decoder, EncoderDecoder, GrowingCache, Route, StandAlone, build_batch

_LOGIT_ENTRIES = 2**24
_MOST_PASSAGES = 64
_ANSWER_TOKENS = 8

Advance = Callable[[int], None]


@dataclass(slots=True)
class Scores:
    """How well a model knows a sample, passage by passage.

    Attributes:
        nll: Negative log-likelihood in nats, summed over the passage's predicted tokens.
        tokens: How many those are.
        correct: For every row whether the greedy answer is the target; empty for running text.
    """

    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)

    @property
    def mean_nll(self) -> float:
        """Per predicted token, in nats."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; None for running text."""
        return sum(self.correct) / len(self.correct) if self.correct else None


@dataclass(slots=True)
class Likeness:
    """How close a model is to its original on the same passages.

    Attributes:
        kl: Sum over predicted tokens of KL(original || model), in nats.
        agreed: Predicted tokens of which both think the same likeliest.
        tokens: Predicted tokens.
        shared: By layer index, slots that both routers chose, over all tokens.
        chosen: By layer index, slots that one router chose.
    """

    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0
    shared: dict[int, int] = field(default_factory=dict)
    chosen: dict[int, int] = field(default_factory=dict)

    @property
    def mean_kl(self) -> float:
        """Per predicted token, in nats."""
        return self.kl / self.tokens

    @property
    def agreement(self) -> float:
        """Share of predicted tokens with the same likeliest one."""
        return self.agreed / self.tokens

    @property
    def routing(self) -> dict[int, float]:
        """By layer index, share of equal top-k slots."""
        return {layer: self.shared[layer] / count for layer, count in sorted(self.chosen.items())}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model on some passages.

    Attributes:
        logits_WV: Of every predicted token, passage after passage.
        labels_W: Those tokens.
        counts: Predicted tokens of each passage.
        slots: By layer index, the slots [T, K] of every token that went through the layer.
    """

    logits_WV: Tensor
    labels_W: Tensor
    counts: list[int]
    slots: dict[int, Tensor]

    def nll(self) -> list[float]:
        """Of each passage, in nats."""
        losses = functional.cross_entropy(self.logits_WV, self.labels_W, reduction="none").double()
        return [float(own.sum()) for own in torch.split(losses, self.counts)]


def score(model: StandAlone, sample: Sample, advance: Advance = lambda num_bytes: None) -> Scores:
    """How well a model knows a sample."""
    scores = Scores()
    for passages in _batches(sample.passages, model.model.config.vocab_size):
        _count(predict(model, passages), scores)
        advance(_num_bytes(passages))
    if sample.rows:
        scores.correct = answer_rows(model, sample)
    return scores


def score_beside(
    model: StandAlone, original: StandAlone, sample: Sample, advance: Advance = lambda num_bytes: None
) -> tuple[Scores, Scores, Likeness]:
    """How well a model and its original know a sample, and how close they are.

    Raises:
        IncompatibleInputs: The original has another vocabulary or other layers.
    """
    scores, own, likeness = Scores(), Scores(), Likeness()
    for passages in _batches(sample.passages, model.model.config.vocab_size):
        found, wanted = predict(model, passages), predict(original, passages)
        compare_predictions(found, wanted, likeness)
        _count(found, scores)
        _count(wanted, own)
        advance(_num_bytes(passages))
    if sample.rows:
        scores.correct, own.correct = answer_rows(model, sample), answer_rows(original, sample)
    return scores, own, likeness


def answer_rows(model: StandAlone, sample: Sample) -> list[bool]:
    """For every row whether the greedy answer equals the target, white space at the ends aside."""
    stop_ids, correct = sample.tokenizer.stop_token_ids, []
    longest = max(len(passage.target_ids) for passage in sample.passages)
    for start in range(0, len(sample.rows), _MOST_PASSAGES):
        rows = sample.rows[start : start + _MOST_PASSAGES]
        prompts = [passage.token_ids for passage in sample.passages[start : start + _MOST_PASSAGES]]
        answers = greedy_answers(model, prompts, stop_ids, max(longest, _ANSWER_TOKENS))
        correct += [
            sample.tokenizer.decode(answer).strip() == row.target.strip()
            for answer, row in zip(answers, rows, strict=True)
        ]
    return correct


def predict(model: StandAlone, passages: Sequence[Passage]) -> Prediction:
    """Run a model over passages, each by itself: windows, or inputs with the target told as it goes."""
    slots: dict[int, Tensor] = {}

    def keep(layer_index: int, hidden_TD: Tensor, route: Route) -> None:
        slots[layer_index] = route.slots_TK

    arithmetic = model.model
    before, arithmetic.on_route = arithmetic.on_route, keep
    try:
        if isinstance(arithmetic, Decoder):
            batch = build_batch([passage.token_ids for passage in passages])
            hidden_TD = arithmetic.forward(batch, model.weights, model.experts)
            lasts = torch.tensor([len(passage.token_ids) for passage in passages]).cumsum(0) - 1
            is_predicting_T = torch.ones(len(hidden_TD), dtype=torch.bool)
            is_predicting_T[lasts] = False
            hidden_WD = hidden_TD[is_predicting_T]
            labels = [token for passage in passages for token in passage.token_ids[1:]]
        else:
            hidden_WD = _told(arithmetic, model, passages)
            labels = [token for passage in passages for token in passage.target_ids]
    finally:
        arithmetic.on_route = before
    logits_WV = arithmetic.logits(hidden_WD, model.weights).float()
    return Prediction(logits_WV, torch.tensor(labels), [num_predicted(p) for p in passages], slots)


def compare_predictions(found: Prediction, original: Prediction, likeness: Likeness) -> None:
    """Count into `likeness`, both having read the same passages.

    Raises:
        IncompatibleInputs: Other vocabularies or layers.
    """
    shapes = [(p.logits_WV.shape[1], {i: s.shape for i, s in p.slots.items()}) for p in (found, original)]
    if shapes[0] != shapes[1]:
        raise IncompatibleInputs(
            f"the original has {shapes[1][0]} tokens and {len(shapes[1][1])} routed layers, what is measured "
            f"has {shapes[0][0]} and {len(shapes[0][1])}; it is the original of something else"
        )
    log_original = original.logits_WV.log_softmax(dim=-1)
    log_found = found.logits_WV.log_softmax(dim=-1)
    likeness.kl += float((log_original.exp() * (log_original - log_found)).sum(dim=-1).double().sum())
    likeness.agreed += int((original.logits_WV.argmax(dim=-1) == found.logits_WV.argmax(dim=-1)).sum())
    likeness.tokens += len(found.labels_W)
    for layer_index, slots_TK in found.slots.items():
        equal_TKK = slots_TK.unsqueeze(2) == original.slots[layer_index].unsqueeze(1)
        shared, chosen = int(equal_TKK.any(dim=-1).sum()), slots_TK.numel()
        likeness.shared[layer_index] = likeness.shared.get(layer_index, 0) + shared
        likeness.chosen[layer_index] = likeness.chosen.get(layer_index, 0) + chosen


def _count(found: Prediction, scores: Scores) -> None:
    scores.nll += found.nll()
    scores.tokens += found.counts


def _num_bytes(passages: Sequence[Passage]) -> int:
    return 4 * sum(passage.num_tokens for passage in passages)


def _told(arithmetic: EncoderDecoder, model: StandAlone, passages: Sequence[Passage]) -> Tensor:
    """The decoder's hidden states while it is told each answer."""
    batch = build_batch([passage.token_ids for passage in passages])
    encoded_TD = arithmetic.encode(batch, model.weights, model.experts)
    cross = GrowingCache().of(batch.spans)
    for layer in range(arithmetic.config.num_decoder_layers):
        cross.write(layer, *arithmetic.cross_keys_and_values(layer, encoded_TD, model.weights))
    start = arithmetic.config.start_token_id
    answers = build_batch([[start, *passage.target_ids[:-1]] for passage in passages])
    lengths = [len(passage.token_ids) for passage in passages]
    return arithmetic.decode(answers, model.weights, model.experts, None, cross, lengths)


def _batches(passages: Sequence[Passage], vocab_size: int) -> Iterator[Sequence[Passage]]:
    """As many passages at once as logits may have entries."""
    longest = max(map(num_predicted, passages))
    size = min(_MOST_PASSAGES, max(1, _LOGIT_ENTRIES // (vocab_size * longest)))
    for start in range(0, len(passages), size):
        yield passages[start : start + size]
