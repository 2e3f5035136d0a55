"""A text and a tokenizer made on the spot, for checkpoints that nothing is downloaded for: tests and same_bytes.py."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 320
PHRASES = (
    "the of and in to was is for on as with by at from that his it an were which are this also be had first "
    "one their its new after who they two her she been other when time during there into school more years "
    "over only year most would world city some where between later up such used many can state about national "
    "out known university united then made no all under while part season found three war may game well "
    "however team being album second film"
)
WORDS = PHRASES.split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
)


def make_prose(words: int, seed: int = 0) -> str:
    """Return seeded prose: sentences of 4 to 14 words, five sentences a line."""
    draw = random.Random(seed)
    sentences = []
    while words > 0:
        n = draw.randint(4, 14)
        sentences.append(" ".join(draw.choices(WORDS, k=n)).capitalize() + ".")
        words -= n
    return "\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)) + "\n"


def make_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCAB` entries; `<s>` exists in both, and is put before every text only if `bos`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([make_prose(2000)], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **special)
