"""A tokenizer, texts and questions for tiny models."""

import json
import random
from pathlib import Path

from tiny_models import VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_hadacore.evaluation.multiple_choice import Item


def word_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    words = {"[BOS]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", unk_token="[UNK]")


def random_words(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(2, VOCAB_SIZE)}" for _ in range(count))


def write_task(file: Path, count: int = 30) -> list[Item]:
    """Questions of 2 to 6 words, with 3 choices of 1 to 4."""
    rng = random.Random(1)
    items = [
        Item(
            random_words(rng.randrange(2, 7), seed=i) + " ",
            [random_words(rng.randrange(1, 5), seed=3 * count + 3 * i + j) for j in range(3)],
            rng.randrange(3),
        )
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(item._asdict()) + "\n" for item in items))
    return items
