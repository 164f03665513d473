"""How a text becomes windows of tokens, to calibrate with and to evaluate on."""

from transformers import PreTrainedTokenizerBase


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a tokenizer puts before a text, if it does.

    Some models are trained that way (Gemma), and lost without it.
    """
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("").input_ids[:1] == [bos] else None


def window_starts(most: int, count: int, length: int) -> list[int]:
    """Where windows begin that do not overlap and are spread over a text evenly.

    Args:
        most: windows that the text holds.
        count: windows wanted, at most that many.
        length: tokens of each.
    """
    return [most * i // count * length for i in range(count)]
