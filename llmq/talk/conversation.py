"""The turns of a chat: what was said, what the model is asked next, and what the commands of a chat change.

A model with a chat template answers messages. One without, a base model, continues a text: what is typed is put behind
what there is, and the model writes on.
Not here: reading a line and printing (commands/talk.py), generating (speaker.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmq.errors import LlmqError
from llmq.talk.speaker import Answer, Message, Sampling, Speaker, TooLongError

BASE = "it has no chat template, so that it answers nothing: it writes on behind what you type (/reset begins anew)"


@dataclass
class Conversation:
    """A chat with a model. system: what it is told before all turns, None where it is told nothing.

    Raises LlmqError for a system text where the model has no chat template.
    """

    speaker: Speaker
    how: Sampling
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        self.tell(self.system)

    def tell(self, system: str | None) -> None:
        """Change what the model is told before all turns, and begin anew."""
        if system is not None and not self.speaker.chats:
            raise LlmqError(f"{self.speaker.name} has no chat template, so that it can be told nothing: leave it out")
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self.text = [], ""

    def ask(self, said: str) -> Answer:
        """Return the answer to what a user says, to be read, and then kept by `keep`.

        Raises LlmqError where the template refuses the turns, or they are too long for the model; nothing is kept then.
        """
        try:
            return self.speaker.answer(self._prompt(said), self.how)
        except TooLongError as e:
            raise TooLongError(f"{e}: /reset forgets what was said") from e

    def keep(self, said: str, answered: str) -> None:
        """Remember a turn, whole or broken off."""
        self.text += said + answered
        self.turns += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]

    def _prompt(self, said: str) -> Sequence[int]:
        if not self.speaker.chats:
            return self.speaker.encode(self.text + said)
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.speaker.prompt([*told, *self.turns, {"role": "user", "content": said}])
