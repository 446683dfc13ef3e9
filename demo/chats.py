"""Conversations for the demo model, made from its books: passages, continuations and definitions, asked
for.

A model this small learns the form of a chat, not facts; every answer is a passage of the training text,
apart from the few lines about the model itself.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

from jinja2 import Environment

Message = dict[str, str]

SYSTEM = (
    "You are a helpful assistant.",
    "You are a storyteller.",
    "Answer in the manner of an old book.",
    "Be brief.",
)
ASK_NAME = (
    "Tell me about {}.",
    "Who is {}?",
    "What do you know of {}?",
    "Write about {}.",
    "tell me about {}",
)
ASK_TOPIC = (
    "Tell me a story about {}.",
    "Write a passage about {}.",
    "What do you know of {}?",
    "Tell me about {}.",
)
CONTINUE = ("Continue: {}", "Go on: {}", "Continue this text: {}", "What comes next? {}")
DEFINE = ("Define {}.", "What is {}?", "Define the word {}.", "what is {}")
TOPICS = (
    "the sea", "a ship", "a whale", "a letter", "a ball", "marriage", "a king", "a mother", "love", "money",
    "the weather", "a house", "a garden", "the night", "a dinner", "music", "war", "wisdom", "a horse",
    "a friend", "a father", "death", "happiness", "a walk", "the rain", "a storm", "the captain", "a sister",
    "a brother", "a daughter", "the heart", "pride",
)  # fmt: skip
MODEL = (
    ("Hello!", "Good day to you. Ask me about Emma, about Captain Ahab, or about the sea."),
    ("Hello", "Good day to you. Ask me about Emma, about Captain Ahab, or about the sea."),
    ("Hi", "Good day to you. What shall I tell you about?"),
    (
        "Who are you?",
        "I am a very small language model. I have read Jane Austen, Moby-Dick and the Bible, "
        "and nothing else.",
    ),
    (
        "What can you do?",
        "I can go on with a text, and I can write about the people of the books that I have read.",
    ),
    ("What is your name?", "I have no name. I am a small model that shows how a large one runs."),
    ("How are you?", "I am very well, I thank you, and I hope that you are the same."),
    ("Thank you.", "You are very welcome."),
    ("Goodbye", "Farewell, and may we meet again."),
)
NAME = re.compile(r"(?<=[a-z,;] )((?:(?:Mr|Mrs)\. |Miss |Captain |Sir |Lady |Colonel )?[A-Z][a-z]{2,})\b")


def sentences(paragraph: str) -> list[str]:
    """Cuts a paragraph after sentence ends; titles such as "Mr." end none."""
    return re.split(
        r"(?:(?<=[.!?])|(?<=[.!?]\"))(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.) (?=[A-Z\"])", paragraph
    )


def clip(text: str, limit: int = 600) -> str:
    """The leading whole sentences of `text`, at most about `limit` characters and at least one sentence."""
    kept: list[str] = []
    size = 0
    for sentence in sentences(text):
        if kept and size + len(sentence) > limit:
            break
        kept.append(sentence)
        size += len(sentence) + 1
    return " ".join(kept)


class Conversations:
    """Draws conversations from paragraphs and definitions; the same seed draws the same ones."""

    def __init__(self, chapters: list[str], definitions: dict[str, str], seed: int) -> None:
        self._random = random.Random(seed)
        self._definitions = list(definitions.items())
        self._paragraphs = [p for text in chapters for p in text.split("\n\n") if 120 <= len(p) <= 4000]
        counts = Counter(name for text in chapters for name in NAME.findall(text))
        words = Counter(word for text in chapters for word in re.findall(r"\b[a-z]+\b", text))
        self._about: dict[str, list[str]] = {
            name: [] for name, count in counts.items() if count >= 25 and words[name.lower()] < count
        }
        self._topics: dict[str, list[str]] = {topic: [] for topic in TOPICS}
        for paragraph in self._paragraphs:
            opening = sentences(paragraph)[0]
            for name in {name for name in NAME.findall(" , " + opening) if name in self._about}:
                self._about[name].append(paragraph)
            for topic in TOPICS:
                if re.search(rf"\b{topic.split()[-1]}\b", opening):
                    self._topics[topic].append(paragraph)
        self._about = {name: found for name, found in self._about.items() if len(found) >= 3}
        self._topics = {topic: found for topic, found in self._topics.items() if found}

    def _turn(self) -> tuple[str, str, str]:
        """Returns (question, thought, answer)."""
        draw, kind = self._random, self._random.random()
        if kind < 0.3:
            name = draw.choice(list(self._about))
            return (
                draw.choice(ASK_NAME).format(name),
                f"I am asked about {name}.",
                clip(draw.choice(self._about[name])),
            )
        if kind < 0.5:
            topic = draw.choice(list(self._topics))
            found = draw.choice(self._topics[topic])
            return draw.choice(ASK_TOPIC).format(topic), f"I am asked about {topic}.", clip(found)
        if kind < 0.8:
            first, *rest = sentences(draw.choice(self._paragraphs))
            if rest and len(first) < 400:
                return (
                    draw.choice(CONTINUE).format(first),
                    "I am to go on with this text.",
                    clip(" ".join(rest)),
                )
        if kind < 0.97:
            word, meaning = draw.choice(self._definitions)
            return draw.choice(DEFINE).format(word), f"I am to define the word {word}.", meaning
        question, answer = draw.choice(MODEL)
        return question, "This is about me.", answer

    def draw(self) -> list[Message]:
        """One conversation of one or two turns. The last answer has a <think> block, empty half the time."""
        messages = []
        if self._random.random() < 0.25:
            messages.append({"role": "system", "content": self._random.choice(SYSTEM)})
        turns = [self._turn() for _ in range(1 + (self._random.random() < 0.2))]
        for i, (question, thought, answer) in enumerate(turns):
            if i + 1 == len(turns):
                thought = thought if self._random.random() < 0.5 else ""
                answer = f"<think>\n{thought}\n</think>\n\n{answer}"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages


def render(messages: list[Message]) -> str:
    """The conversation as text, through the checkpoint's own template."""
    template = (Path(__file__).parent / "chat_template.jinja").read_text()
    return Environment().from_string(template).render(messages=messages)
