"""Which text, and how it becomes windows of tokens: to calibrate with and to evaluate on."""

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


def parse_dataset(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and split of a hub dataset ``name[:config[:split]]``; None for what is not given."""
    name, config, split = [*source.split(":"), "", ""][:3]
    return name, config or None, split or None
