"""A conversation of several turns with the variants of one engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

from moemerge.runner.engine import Engine
from moemerge.runner.sampling import Sampling
from moemerge.text.answers import Answer, answer
from moemerge.text.templates import Message
from moemerge.text.variants import BundleText, VariantText


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What was said so far, and who answers next.

    Attributes:
        engine: Serves the variants; nothing else may be under way in it.
        texts: Of its bundle.
        text: Of the variant that answers next.
        system: What stands in front of all turns, if anything.
        messages: The turns so far.
    """

    engine: Engine
    texts: BundleText
    text: VariantText
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choose(self.text.name)

    def choose(self, variant: str) -> None:
        """Let another variant answer from now on; it sees all turns.

        Raises:
            NotFound: It is not served, or has no chat template.
        """
        self.engine.limits_of(variant)
        text = self.texts.of(variant)
        text.require_chat_template()
        self.text = text

    def reset(self) -> None:
        """Forget all turns."""
        self.messages.clear()

    def say(
        self,
        content: str,
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...] = (),
        write: Callable[[str], None],
        think: Callable[[str], None] = lambda piece: None,
        is_cancelled: Callable[[], bool],
    ) -> Answer:
        """Say something; the answer joins the conversation without its thinking; see `answers.answer`.

        Raises:
            ContextExceeded: The conversation leaves no room for an answer; this turn is forgotten.
            InvalidRecipe: The conversation does not fit the template; this turn is forgotten.
        """
        turn: Message = {"role": "user", "content": content}
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        prompt_ids = self.text.encode_chat([*system, *self.messages, turn])
        found = answer(
            self.engine,
            self.text,
            prompt_ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            chat=True,
            write=write,
            think=think,
            is_cancelled=is_cancelled,
        )
        self.messages += [turn, {"role": "assistant", "content": found.text.strip()}]
        return found
