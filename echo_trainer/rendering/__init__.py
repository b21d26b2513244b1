"""
From rows to token ids and labels: one way for training, evaluation, ablation and layer selection.

A row comes in one of a few forms [forms], its messages in one of several spellings [messages]; what its answers are
depends on the form:

    conversation without a completion    the assistant's turns: where the chat template marks them, or TRL has a
                                         template that does, by those marks; else by rendering prefixes [turns]
    text, or a `formatting_func`         what follows the answer marker [marker], or the words by which the chat
                                         template asks, where it wrote the text [words]
    prompt and completion                the completion, as in TRL
    token ids                            what has a label, as they are

Rows that TRL cannot give labels to get them here [spans]; TRL does the rest, in training and everywhere else
[rendering]. Images are collated by TRL, with the same answers [vision].
"""
