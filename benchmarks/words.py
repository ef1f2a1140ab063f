"""A tokenizer of made-up words, for models with random weights."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: int, special: Sequence[str], **names: str) -> PreTrainedTokenizerFast:
    """A token for each of the words w0, w1, ... behind the special tokens; unknown words are the first of these.

    Args:
        words: How many.
        special: Tokens with the first ids.
        **names: What the special tokens are for, such as `pad_token`.
    """
    ids = {name: i for i, name in enumerate([*special, *(f"w{i}" for i in range(words))])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
