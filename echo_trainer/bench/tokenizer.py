"""A tokenizer for runs on random token ids: trainers want one, and nothing is ever tokenised."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a pad, an end and an unknown token, and no words."""
    tokens = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
