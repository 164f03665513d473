"""A tokenizer of the tiny models' vocabulary: words w2, w3 ..., one token each."""

from tiny_models import VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}w7 {{ message['content'] }} {% endfor %}w8"


def make_tokenizer(
    *, bos: str | None = None, chat_template: str | None = TEMPLATE
) -> PreTrainedTokenizerFast:
    """The tokenizer.

    Args:
        bos: the word that is put before every text, if any.
        chat_template: of conversations.
    """
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, words[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token=bos,
        chat_template=chat_template,
    )
