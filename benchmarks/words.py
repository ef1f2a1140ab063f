"""Tokenizers made on the spot: of made-up words, for models with random weights, and of given texts."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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


def text_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on some texts, so that any language can be written.

    Args:
        texts: To learn from.
        size: Tokens in all, of which `<pad>` and `<eos>` are the first.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
